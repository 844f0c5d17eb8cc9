"""How far an answer is from the truth; pure functions on strings.

A metric takes as many answers as truths; a truth is one or more strings that are right.  Each is
the definition of the benchmark named with it, so that figures can be set beside published ones::

    cer       character error rate, share of exact answers      lines of text
    anls      1 - edit distance / length, from 0.5 on           DocVQA, InfoVQA, STVQA
    relaxed   numbers within 5 %, words equal                   ChartQA
    vqa       min(1, people who said so / 3)                    VQAv2, OKVQA, TextVQA
    contains  a truth stands in the answer                      OCRBench
    yes_no    accuracy, precision, recall, F1 of "yes"          POPE
    choice    the letter of the option                          MMBench, MMStar, AI2D, MMMU, SEED
    box       IoU of the first box, share from 0.5 on           RefCOCO
    jaccard   words in common / words in either, exact          VCR
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

Truth = tuple[str, ...]
Box = tuple[float, float, float, float]


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance in characters.

    >>> edit_distance("kitten", "sitting")
    3
    """
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def cer(predictions: Sequence[str], truths: Sequence[str]) -> float:
    """Character error rate: all edits over all characters of the truths.

    Args:
        predictions: as many as truths.
        truths: what is right.

    >>> cer(["abc", "x"], ["abd", "x"])
    0.25
    """
    edits = sum(edit_distance(p, t) for p, t in zip(predictions, truths, strict=True))
    return edits / max(1, sum(len(t) for t in truths))


def anls(prediction: str, truth: Truth) -> float:
    """Normalised Levenshtein similarity to the nearest truth, 0 below one half.

    Case and runs of blanks do not count (Biten et al. 2019, the threshold of DocVQA).

    >>> anls("Paris ", ("paris",)), anls("Pariss", ("paris",)), anls("Rome", ("paris",))
    (1.0, 0.8333333333333334, 0.0)
    """
    best = 0.0
    said = " ".join(prediction.lower().split())
    for right in (" ".join(t.lower().split()) for t in truth):
        length = max(len(said), len(right))
        near = 1.0 if length == 0 else 1 - edit_distance(said, right) / length
        best = max(best, near)
    return best if best >= 0.5 else 0.0


def number(text: str) -> float | None:
    """What a figure means, per cent as hundredths; None of words.

    >>> number("1,200"), number("45%"), number("$3.5"), number("abc")
    (1200.0, 0.45, 3.5, None)
    """
    bare = text.strip().rstrip(".").replace(",", "").lstrip("$€£ ")
    try:
        return float(bare[:-1]) / 100 if bare.endswith("%") else float(bare)
    except ValueError:
        return None


def relaxed(prediction: str, truth: Truth) -> bool:
    """Numbers may be off by 5 per cent, words not at all, but for case (Methani et al. 2020).

    >>> relaxed("104", ("100",)), relaxed("106", ("100",)), relaxed("Blue", ("blue",))
    (True, False, True)
    """
    for right in truth:
        ours, theirs = number(prediction), number(right)
        if ours is not None and theirs is not None:
            # A chart's 45 may be answered "45%": its unit is no mistake.
            sizes = {ours, ours * 100} if prediction.strip(". ").endswith("%") else {ours}
            if any(abs(size - theirs) <= 0.05 * abs(theirs) for size in sizes):
                return True
        elif prediction.strip().rstrip(".").lower() == right.strip().lower():
            return True
    return False


_NUMBERS = {
    name: str(value)
    for value, name in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_SPACED = re.compile(rf"[{re.escape(string.punctuation.replace(chr(39), ''))}]")


def plain_words(text: str) -> str:
    """As the VQA challenge compares: lower case, no articles, no punctuation, digits for numbers.

    >>> plain_words("The two  dogs!")
    '2 dogs'
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", text.replace("\n", " ").lower().strip())
    text = re.sub(r"\.(?!\d)", "", text)  # a full stop, not a decimal point
    text = _SPACED.sub(lambda found: found[0] if found[0] == "." else " ", text)
    words = (_NUMBERS.get(word, word) for word in text.split() if word not in _ARTICLES)
    return " ".join(words)


def vqa(prediction: str, truth: Truth) -> float:
    """Accuracy against ten people: the mean of min(1, agreeing / 3) over all nine of them.

    One truth alone counts as ten equal ones (Antol et al. 2015).

    >>> vqa("yes", ("yes",) * 2 + ("no",) * 8)
    0.6
    """
    people = [plain_words(t) for t in (truth * 10 if len(truth) == 1 else truth)]
    said = plain_words(prediction)
    agreeing = sum(said == one for one in people)
    shares = [min(1.0, (agreeing - (said == one)) / 3) for one in people]
    return round(sum(shares) / len(shares), 12)


def contains(prediction: str, truth: Truth) -> bool:
    """Whether a truth stands somewhere in the answer, whatever its case (Liu et al. 2023).

    >>> contains("It says STOP.", ("stop",))
    True
    """
    said = " ".join(prediction.lower().split())
    return any(" ".join(t.lower().split()) in said for t in truth)


def yes(prediction: str) -> bool:
    """An answer is a no where a no stands in its first sentence, else a yes (Li et al. 2023).

    >>> yes("Yes, there is."), yes("There is no dog."), yes("No")
    (True, False, False)
    """
    words = plain_words(prediction.split(".")[0].replace(",", " ")).split()
    return not ({"no", "not"} & set(words))


def letter(prediction: str) -> str:
    """The option that an answer names: "B", "(B)", "B. a dog", "The answer is B"; "" if none.

    >>> letter("(b) a dog"), letter("The answer is C."), letter("A dog")
    ('B', 'C', '')
    """
    text = prediction.strip()
    found = re.match(r"\(?([A-Ha-h])\)?(?:[.:)]|$)", text) or re.match(r"\(([A-Ha-h])\)", text)
    found = found or re.search(r"\b(?:answer|option|choice)\W+(?:is\W+)?\(?([A-H])\b", text, re.I)
    return found[1].upper() if found else ""


def boxes(text: str) -> list[Box]:
    """The boxes of an answer, shares of width and height: ``[[x0,y0,x1,y1;...]]`` in 000-999.

    >>> boxes("the dog [[000,250,500,999]]")
    [(0.0, 0.25, 0.5, 0.999)]
    """
    found = []
    for group in re.findall(r"\[\[([\d.,;\s]+)\]\]", text):
        for one in group.split(";"):
            numbers = [float(n) / 1000 for n in re.findall(r"\d+(?:\.\d+)?", one)]
            if len(numbers) == 4:
                found.append((numbers[0], numbers[1], numbers[2], numbers[3]))
    return found


def common(a: Box, b: Box) -> float:
    """The area that two boxes have in common.

    >>> common((0, 0, 2, 1), (1, 0, 3, 1)), common((0, 0, 1, 1), (2, 2, 3, 3))
    (1.0, 0.0)
    """
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return float(max(0.0, width) * max(0.0, height))


def iou(a: Box, b: Box) -> float:
    """What two boxes have in common, over what they cover together.

    >>> iou((0, 0, 2, 1), (1, 0, 3, 1))
    0.3333333333333333
    """
    both = common(a, b)
    areas = [max(0.0, x1 - x0) * max(0.0, y1 - y0) for x0, y0, x1, y1 in (a, b)]
    return both / (sum(areas) - both) if both else 0.0


def jaccard(prediction: str, truth: Truth) -> float:
    """Words in common over words in either, of the nearest truth.

    >>> jaccard("a red car", ("a car",))
    0.6666666666666666
    """
    said = set(prediction.lower().split())
    shares = []
    for right in (set(t.lower().split()) for t in truth):
        shares.append(len(said & right) / len(said | right) if said | right else 1.0)
    return max(shares, default=0.0)


Scores = dict[str, float]
Metric = Callable[[Sequence[str], Sequence[Truth]], Scores]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _each(name: str, one: Callable[[str, Truth], float]) -> Metric:
    def metric(predictions: Sequence[str], truths: Sequence[Truth]) -> Scores:
        return {name: _mean([one(p, t) for p, t in zip(predictions, truths, strict=True)])}

    return metric


def _exact(prediction: str, truth: Truth) -> bool:
    return prediction in truth


def _read(predictions: Sequence[str], truths: Sequence[Truth]) -> Scores:
    pairs = list(zip(predictions, truths, strict=True))
    nearest = [min(t, key=lambda right: edit_distance(p, right)) for p, t in pairs]
    return {"cer": cer(predictions, nearest), "exact": _mean([_exact(p, t) for p, t in pairs])}


def _anls(predictions: Sequence[str], truths: Sequence[Truth]) -> Scores:
    return _each("anls", anls)(predictions, truths) | _each("exact", _exact)(predictions, truths)


def _yes_no(predictions: Sequence[str], truths: Sequence[Truth]) -> Scores:
    pairs = [(yes(p), yes(t[0])) for p, t in zip(predictions, truths, strict=True)]
    both, said = sum(p and t for p, t in pairs), sum(p for p, _ in pairs)
    precision, recall = both / max(1, said), both / max(1, sum(t for _, t in pairs))
    return {
        "accuracy": _mean([p == t for p, t in pairs]),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if both else 0.0,
        "yes": said / max(1, len(pairs)),
    }


def _choice(prediction: str, truth: Truth) -> bool:
    return letter(prediction) in {t.strip().upper() for t in truth}


def _box(predictions: Sequence[str], truths: Sequence[Truth]) -> Scores:
    shares = []
    for said, truth in zip(predictions, truths, strict=True):
        right = [box for t in truth for box in boxes(t)]
        shares.append(
            max((iou(box, other) for box in boxes(said)[:1] for other in right), default=0.0)
        )
    return {"iou_0.5": _mean([share >= 0.5 for share in shares]), "iou": _mean(shares)}


def _jaccard(predictions: Sequence[str], truths: Sequence[Truth]) -> Scores:
    found = _each("jaccard", jaccard)(predictions, truths)
    return found | _each("exact", _exact)(predictions, truths)


METRICS: dict[str, Metric] = {
    "cer": _read,
    "anls": _anls,
    "relaxed": _each("relaxed", relaxed),
    "vqa": _each("vqa", vqa),
    "contains": _each("contains", contains),
    "yes_no": _yes_no,
    "choice": _each("accuracy", _choice),
    "box": _box,
    "jaccard": _jaccard,
}
