"""How good translations are: BLEU, chrF and the share that is right to the letter."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from sacrebleu.metrics import BLEU, CHRF
from torch import distributed

from evomoe.errors import ConfigError, EvomoeWarning

UNSEGMENTED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
"""Scripts without blanks between words, by the beginnings of Unicode's names of their characters."""

CUT_AT_BLANKS = ("13a", "intl", "none")


@dataclass(frozen=True)
class TranslatedSentence:
    """A sentence and what became of it.

    Args:
        index: number of the pair in its split.
        source: the sentence.
        reference: its translation in the data.
        hypothesis: its translation by the model, under the training rule.
        sparse_hypothesis: the same under the final sparse rule.
    """

    index: int
    source: str
    reference: str
    hypothesis: str
    sparse_hypothesis: str


class TranslationScores:
    """Scores of all translations of all processes, by sacrebleu (Post, 2018) on the texts as they are.

    Args:
        tokenizer: how BLEU cuts the texts into words, by sacrebleu's name.

    Raises:
        ConfigError: if sacrebleu knows no such tokenizer, or misses a package for it.
    """

    def __init__(self, tokenizer: str = "13a") -> None:
        if tokenizer not in BLEU.TOKENIZERS:
            known = ", ".join(sorted(BLEU.TOKENIZERS))
            raise ConfigError(f"task.bleu_tokenizer={tokenizer} is unknown to sacrebleu; choose one of {known}")
        try:
            self._bleu = BLEU(tokenize=tokenizer)
        except (ImportError, RuntimeError) as error:
            raise ConfigError(f"task.bleu_tokenizer={tokenizer}: {' '.join(str(error).split())}") from error
        self._tokenizer = tokenizer
        self._chrf = CHRF()
        self.translations: list[TranslatedSentence] = []

    def reset(self) -> None:
        """Begin anew."""
        self.translations = []

    def add(self, translation: TranslatedSentence) -> None:
        """Count a translation of this process."""
        self.translations.append(translation)

    def compute(self) -> dict[str, float]:
        """``bleu`` and ``chrf`` in percent, ``exact_match`` as a share; nothing if no process has translated.

        Under both rules, those of the final one with the suffix ``_sparse``.
        """
        translations = self.gather()
        if not translations:
            return {}
        references = [translation.reference for translation in translations]
        hypotheses = [translation.hypothesis for translation in translations]
        sparse_hypotheses = [translation.sparse_hypothesis for translation in translations]
        values = self._score(hypotheses, references)
        sparse_values = values if sparse_hypotheses == hypotheses else self._score(sparse_hypotheses, references)
        if self._tokenizer in CUT_AT_BLANKS and is_unsegmented(references):
            warnings.warn(
                f"task.bleu_tokenizer={self._tokenizer} cuts at blanks, which the references hardly have, so their BLEU"
                " means little: look at chrF, or set task.bleu_tokenizer=char (zh, ja-mecab)",
                EvomoeWarning,
                stacklevel=2,
            )
        return values | {f"{name}_sparse": value for name, value in sparse_values.items()}

    @property
    def bleu_signature(self) -> str:
        """What BLEU was computed with; complete once it has been."""
        return self._bleu.get_signature().format()

    @property
    def chrf_signature(self) -> str:
        """What chrF was computed with; complete once it has been."""
        return self._chrf.get_signature().format()

    def _score(self, hypotheses: list[str], references: list[str]) -> dict[str, float]:
        exact = sum(hypothesis == reference for hypothesis, reference in zip(hypotheses, references, strict=True))
        return {
            "bleu": self._bleu.corpus_score(hypotheses, [references]).score,
            "chrf": self._chrf.corpus_score(hypotheses, [references]).score,
            "exact_match": exact / len(hypotheses),
        }

    def gather(self) -> list[TranslatedSentence]:
        """The translations of all processes, in the order of the split."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return sorted(self.translations, key=lambda found: found.index)
        parts: list[list[TranslatedSentence]] = [[] for _ in range(distributed.get_world_size())]
        distributed.all_gather_object(parts, self.translations)
        return sorted((translation for part in parts for translation in part), key=lambda found: found.index)


def is_unsegmented(texts: Iterable[str]) -> bool:
    """Whether most letters are of a script that puts no blanks between words, such as Chinese, Japanese or Thai."""
    letters = [character for text in texts for character in text if character.isalpha()]
    names = (unicodedata.name(letter, "") for letter in letters)
    return 2 * sum(name.startswith(UNSEGMENTED) for name in names) > len(letters)
