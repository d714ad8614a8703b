"""Training the systems on pairs of pictures: losses, and what the loop is made of."""
