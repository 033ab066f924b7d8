"""The parts of `recipes/train_small.py`: text, tokenizer, networks, training, export, card."""
