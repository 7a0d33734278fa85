"""Records of a run and pictures made from them."""
