"""plumbing/files.py: tables."""

from plumbing.files import table


def test_table_aligns_words_left_and_numbers_right():
    rows = [["sft", "12", "1,000", "fits"], ["dpo_lora", "3", "7", "does not"]]
    assert table(["run", "steps", "tokens", "memory"], rows, left=(0, -1)) == (
        "run       steps  tokens  memory\n"
        "sft          12   1,000  fits\n"
        "dpo_lora      3       7  does not"
    )  # fmt: skip
    assert table(["a", "b"], []) == "a  b"
