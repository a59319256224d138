"""How good a model is (attributes drawn and told), and how fast each back end runs it."""
