"""Text for small corpora, and a cache folder of a test's own."""

import random

WORDS = (
    *("ähre", "brook", "cloud", "delta", "éclair", "fjord", "grove", "harbour"),
    *("inlet", "juniper", "kelp", "lagoon", "meadow", "小川", "nest", "ωκεανός"),
)


def prose(characters=20_000, *, seed=0):
    """Lines of words, some of them other than ASCII; the same for a seed."""
    print(f"seed = {seed}")
    chance = random.Random(seed)
    lines, length = [], 0
    while length < characters:
        lines.append(" ".join(chance.choice(WORDS) for _ in range(chance.randint(3, 9))) + ".")
        length += len(lines[-1]) + 1
    return "\n".join(lines)[:characters]


def write(folder, *documents):
    """A file each, `text-0.txt` and so on; their paths."""
    paths = [folder / f"text-{index}.txt" for index in range(len(documents))]
    for path, document in zip(paths, documents, strict=True):
        path.write_text(document, encoding="utf-8")
    return [str(path) for path in paths]
