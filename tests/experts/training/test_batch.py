"""A batch as padded tensors."""

from __future__ import annotations

from sam.experts.training.batch import Batch, Example, padded


def test_padded_by_hand() -> None:
    tensors = padded(Batch((5, 6), (Example((7, 8, 9), 1), Example((7, 4), 1))))
    assert tensors["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [5, 6, 7, 4, 0, 0, 0, 0]]
    assert tensors["attention_mask"].tolist() == [[1] * 5 + [0] * 3, [1] * 4 + [0] * 4]
    assert tensors["labels"].tolist() == [[-100] * 4 + [9] + [-100] * 3, [-100] * 3 + [4] + [-100] * 4]
