"""Small programs that show how a piece is used; the tests run them."""
