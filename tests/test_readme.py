"""The README says what the committed results say."""

from benchmarks import readme


def test_figures_are_those_of_the_results():
    text = readme.README.read_text()
    assert readme.written(text) == text, "run: python -m benchmarks.readme"
