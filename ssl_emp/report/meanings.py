"""What the lines of a run's train.log that begin with `warning` or `note` mean, for somebody who reads them
the first time.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Meaning:
    """Of every line that holds `words`."""

    words: str
    title: str
    text: str


MEANINGS = (
    Meaning(
        "little more than noise",
        "The ranking is mostly chance",
        "A score is one loss of one random pair of views. Where two draws of it hardly agree, the samples "
        "with the highest scores are nearly a random choice. Nothing is lost against random pruning of the "
        "same size, but the score earns nothing either. Averages over epochs, or scores with the draw's part "
        "taken out, rank better.",
    ),
    Meaning(
        "of the two parts of the score only",
        "One of the two terms decides alone",
        "EMP's score adds a loss and a memory term. Where one of them spreads several times wider than the "
        "other over the samples, the ranking is that term, and the other has no say.",
    ),
    Meaning(
        "were in none of the last",
        "Some images are left out for long",
        "Leaving out is what pruning is for, but images that are not trained on for many epochs have scores "
        "as old as that, and the network may have forgotten them. A share of the budget drawn by chance "
        "brings them back.",
    ),
    Meaning(
        "images take turns",
        "What was trained on is left out next",
        "Training on a sample lowers its loss, so that the next epoch prefers the others, and the kept sets "
        "take turns. Each sample is then seen at a lower frequency, whatever it is worth.",
    ),
    Meaning(
        "with a wrong label are kept too often",
        "Wrong labels are preferred",
        "A wrong label cannot be learned, so its loss stays high, and a ranking by loss keeps it. More "
        "weight on the memory term works against that.",
    ),
    Meaning(
        "classes are kept unevenly",
        "Classes are kept unevenly",
        "Some classes are kept more often than their share of the data. Some of that is the method at work: "
        "easy classes need less. It matters where the classes that lose are those that you care about.",
    ),
    Meaning(
        "that training began from",
        "Below the weights that it began from",
        "The encoder is at this point worse than the start it was given. A high learning rate often does "
        "that in the first epochs. It should come back.",
    ),
    Meaning(
        "skipped for a loss or gradient",
        "Steps were skipped",
        "A loss or a gradient was not a finite number. Such a step changes nothing, neither the weights nor "
        "what is remembered of the samples. A few do no harm; many mean that the learning rate is too high.",
    ),
    Meaning(
        "kNN accuracy cannot be measured",
        "The kNN accuracy is missing",
        "Features of the encoder could not be compared, mostly since they are all alike or not finite: such "
        "an encoder has collapsed or diverged.",
    ),
    Meaning(
        "no pair is ever learned",
        "The loss does not fall silent",
        "At this temperature and batch size even a perfect pair keeps a loss of some size. Then no sample "
        "stands out as learned, and there is little that pruning could leave out.",
    ),
    Meaning(
        "nothing is pruned",
        "Nothing was pruned",
        "With these settings every epoch trains on every sample.",
    ),
    Meaning(
        "learning rate",
        "The warm-up is long for this run",
        "The learning rate rises for a large part of the run, which leaves little time at its height.",
    ),
    Meaning(
        "full weight, learned or not",
        "The loss does not fall silent",
        "The decoupled loss gives every pair its full weight, however well it is learned, so that there is "
        "little that pruning could leave out.",
    ),
    Meaning(
        "metrics.jsonl has no row",
        "Epochs are missing from the curves",
        "Rows of metrics.jsonl were lost. The curves have gaps there; the encoder is not touched by that.",
    ),
    Meaning(
        "normalised by",
        "Images are normalised in another way than the start's were",
        "The weights that the run began from were trained on images normalised by another mean and standard "
        "deviation, so that its first features are not what they could be.",
    ),
)


def meaning_of(line: str) -> Meaning | None:
    """Of a line of train.log without its time; None where nothing is known beyond the line itself."""
    return next((meaning for meaning in MEANINGS if meaning.words in line), None)
