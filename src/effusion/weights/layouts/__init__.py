"""How other programs name and pack the weights of networks that we have: tables, and what reads them."""
