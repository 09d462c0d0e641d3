"""Text from files or a dataset -> token sequences of one length, some of them held out."""

import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from moe_kernels.cli import UsageError, first_line

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
_PIECE = 1 << 16  # characters read at once: the tokenizer's working memory stays small whatever the file's size
_MOST_HELD_OUT = 32


def check(source: str | None) -> None:
    """Refuse a source that can't be read, before anything slow begins."""
    try:
        if source is None or Path(source).expanduser().exists():
            return
    except (OSError, RuntimeError) as error:  # a name too long, an unknown ~user
        raise UsageError(f"--data: can't look for {source} ({first_line(error)})") from None
    if source.startswith(("/", ".", "~")) or Path(source).suffix in (*TEXT_SUFFIXES, ".jsonl"):
        raise UsageError(f"--data: no such file or directory: {source}")
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise UsageError(
            f"--data: no such file or directory: {source} (to read it as a dataset id: pip install datasets)"
        ) from None


def pieces(source: str | None, seed: int) -> Iterator[str | None]:
    """The text of ``source`` in pieces; None ends a document."""
    if source is None:
        yield from _files(_shuffled(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")), seed))
        return
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
        found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not found:
            raise UsageError(f"--data: {source} holds no text files ({', '.join(TEXT_SUFFIXES)})")
        yield from _files(_shuffled(found, seed))
    elif path.suffix == ".jsonl":
        yield from _jsonl(path)
    elif path.exists():
        yield from _files([path])
    else:
        yield from _dataset(source)


def _shuffled(files: list[Path], seed: int) -> list[Path]:
    # Alphabetical order would hold out whatever sorts last.
    random.Random(seed).shuffle(files)
    return files


def _files(files: list[Path]) -> Iterator[str | None]:
    for file in files:
        try:
            with file.open(encoding="utf-8") as text:
                while piece := text.read(_PIECE):
                    yield piece
        except UnicodeDecodeError:
            raise UsageError(f"--data: {file} is not UTF-8 text") from None
        except OSError as error:
            raise UsageError(f"--data: can't read {file} ({error.strerror})") from None
        yield None


def _jsonl(path: Path) -> Iterator[str | None]:
    try:
        with path.open(encoding="utf-8-sig") as lines:  # some editors put a byte order mark first
            for number, line in enumerate(lines, 1):
                if line.isspace():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UsageError(f"--data: {path}, line {number}: not valid JSON ({error.msg})") from None
                if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                    raise UsageError(f'--data: {path}, line {number}: no "text" field with a string in it')
                yield record["text"]
                yield None
    except UnicodeDecodeError:
        raise UsageError(f"--data: {path} is not UTF-8 text") from None
    except OSError as error:
        raise UsageError(f"--data: can't read {path} ({error.strerror})") from None


def _dataset(name: str) -> Iterator[str | None]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
    except Exception as error:  # the library raises a dozen kinds for "not there" alone
        raise UsageError(f"--data: can't load the dataset {name} ({first_line(error)})") from None
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise UsageError(f'--data: the dataset {name} has no "text" column with strings in it')
        yield row["text"]
        yield None


def sequences(source: str | None, tokenizer, *, seq_len: int, wanted: int, seed: int):
    """Tokenise until ``wanted`` training sequences are there, or the text ends.

    Documents follow each other with the end-of-text token between them and are cut every ``seq_len`` tokens. The last
    tenth, 32 sequences at most, is held out: text that training never sees.

    Returns:
        (train, held_out): int32 arrays [sequences, seq_len].
    """
    import numpy

    need = (wanted + _MOST_HELD_OUT) * seq_len
    parts, count, characters, from_text = [], 0, 0, 0
    for piece in pieces(source, seed):
        if piece is None:
            ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        else:
            ids = tokenizer(piece, add_special_tokens=False)["input_ids"]
            characters += len(piece.strip())
            from_text += len(ids)
        parts.append(numpy.asarray(ids, dtype=numpy.int32))
        count += len(ids)
        if count >= need:
            break
    name = source or "Python's standard library"
    if not characters:
        raise UsageError(f"--data: {name} has no text")
    if not from_text:
        # What Transformers makes of a checkpoint without tokenizer files: training would see end-of-text alone.
        raise UsageError("--model: its tokenizer turns text into no tokens (are its files missing?)")
    if count < 2 * seq_len:
        raise UsageError(
            f"--data: {name} gives {count} tokens; --seq-len {seq_len} needs at least {2 * seq_len}, one sequence to "
            "train on and one held out"
        )
    rows = min(count, need) // seq_len
    packed = numpy.concatenate(parts)[: rows * seq_len].reshape(rows, seq_len)
    held_out = max(1, min(_MOST_HELD_OUT, rows // 10))
    return packed[:-held_out], packed[-held_out:]
