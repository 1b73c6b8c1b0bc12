"""Named entity recognition: prompts, parsing, grammar, combining and scores of mentions."""
