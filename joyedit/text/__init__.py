"""From words to tokens, and learned words."""
