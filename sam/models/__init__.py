"""The base model and the sentence encoder: where they come from, what identifies them, and how they are loaded."""
