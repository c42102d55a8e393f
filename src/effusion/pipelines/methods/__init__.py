"""The steps of a call as methods of pipelines, under the ecosystem's names: thin, over blocks and families."""
