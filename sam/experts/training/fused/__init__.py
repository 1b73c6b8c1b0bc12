"""A faster training of the same adapter (``train.fused``): forward and backward passes of our own, and several
sentences in a row. All of it can be left out: ``train.fused=false`` is plain PEFT in plain Lightning.
"""
