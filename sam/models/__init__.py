"""The base model and the sentence encoder: where they come from, what they are, and how they are loaded."""
