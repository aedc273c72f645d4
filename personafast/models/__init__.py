"""The shape of Hugging Face decoders, and what is plugged into them."""
