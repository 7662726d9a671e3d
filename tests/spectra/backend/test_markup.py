from html.parser import HTMLParser

import pytest

from spectra.backend import markup

HOSTILE = """<script>alert("1")</script>&amp;'<b>"""


class Read(HTMLParser):
    """The texts of a piece of HTML, and its tags; fails where they are not nested."""

    def __init__(self, html):
        super().__init__()
        self.texts, self.tags, self.open = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.open.append(tag)
        assert [name for name, _ in attributes] in ([], ["style"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)


@pytest.mark.parametrize("words", [HOSTILE, "<", "a < b & c", "&lt;"])
def test_a_reader_gets_the_texts_back(words):
    sentence = Read(markup.sentence(words, words))
    assert sentence.texts == [f"{words} ", words]
    assert sentence.tags == ["span", "span"]
    table = Read(markup.table([words, "b"], [[words, "2"], ["3", words]], heading=words, notes=[words]))
    assert table.texts == [words, words, "b", words, "2", "3", words, words]
    assert (table.tags.count("tr"), table.tags.count("td"), table.tags.count("th")) == (3, 4, 2)
