"""How the toy model was trained: text encoders, VAE, transformer. Its README says how to run it."""
