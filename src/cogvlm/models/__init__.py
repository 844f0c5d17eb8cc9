"""The models: tower, decoder, positions, and the mapping of tensor names."""
