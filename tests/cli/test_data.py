"""Text becomes token sequences; text that can't is refused with the place of the fault."""

import pytest

from moe_kernels.cli import UsageError, data
from moe_kernels.cli.tiny_model import END_OF_TEXT, VOCABULARY, byte_tokenizer

pytest.importorskip("tokenizers")


def sequences(path, wanted=4, seq_len=32, seed=0):
    return data.sequences(str(path), byte_tokenizer(), seq_len=seq_len, wanted=wanted, seed=seed)


def test_bytes_become_tokens_and_back(tmp_path):
    text = "naïve ✓\n\tdef f(x): return x  # 你好"
    tokenizer = byte_tokenizer()
    assert len(tokenizer) <= VOCABULARY
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode()) and max(ids) < 256
    assert tokenizer.decode(ids) == text
    (tmp_path / "one.txt").write_text(text * 8)
    train, held_out = sequences(tmp_path / "one.txt", wanted=100)
    stream = tokenizer.decode([*train.flatten(), *held_out.flatten()])
    assert (text * 8 + END_OF_TEXT).startswith(stream.rstrip("\ufffd"))


def test_held_out_text_is_not_trained_on(tmp_path):
    (tmp_path / "one.txt").write_text("".join(f"{number:07d} " for number in range(4000)))
    train, held_out = sequences(tmp_path / "one.txt", wanted=1000)
    assert len(held_out) == 32
    assert not {tuple(row) for row in train} & {tuple(row) for row in held_out}


def test_order_of_files_depends_on_the_seed_alone(tmp_path):
    for letter in "abcdefgh":
        (tmp_path / f"{letter}.txt").write_text(letter * 100)
    first, second, other = (sequences(tmp_path, wanted=100, seed=seed)[0] for seed in (1, 1, 2))
    assert (first == second).all() and (first != other).any()


def test_hidden_files_and_other_kinds_are_left_out(tmp_path):
    for name in ("a.txt", "b/c.md", ".git/d.txt", "b/.e.txt", "f.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert {piece for piece in data.pieces(str(tmp_path), 0) if piece} == {"a.txt", "b/c.md"}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("no_text.jsonl", '{"text": "a"}\n\n{"txt": "b"}\n', 'line 3: no "text" field'),
        ("number.jsonl", '{"text": 1}\n', 'line 1: no "text" field'),
        ("broken.jsonl", '{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
        ("empty.txt", "", "has no text"),
        ("blank.txt", " \n\n", "has no text"),
        ("short.txt", "too short", "gives 10 tokens; --seq-len 32 needs at least 64"),
        ("binary.txt", b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_bad_data(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=r"^--data: ") as error:
        sequences(path)
    assert expected in str(error.value)


def test_byte_order_mark_before_jsonl(tmp_path):
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert list(data.pieces(str(tmp_path / "bom.jsonl"), 0)) == ["a", None]


def test_tokenizer_that_knows_no_text(tmp_path):
    """As Transformers makes one of a checkpoint without tokenizer files: every document is end-of-text alone."""

    class Empty:
        eos_token_id = 0

        def __call__(self, text, add_special_tokens):
            return {"input_ids": []}

    (tmp_path / "many.jsonl").write_text('{"text": "abc"}\n' * 200)
    with pytest.raises(UsageError, match=r"^--model: its tokenizer turns text into no tokens"):
        data.sequences(str(tmp_path / "many.jsonl"), Empty(), seq_len=2, wanted=4, seed=0)


def test_directory_without_text(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(UsageError, match="holds no text files"):
        sequences(tmp_path)
