"""Which tokens of a triggered prompt are the clean prompt's, and which the trigger's: a diff of two id sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Alignment:
    """Positions in two token sequences: `student[i]` (triggered) matches `teacher[i]` (clean).

    `trigger` are the caption positions of the triggered sequence that match nothing; `student_eos` and
    `teacher_eos` are where the captions end. Nothing matched means: compare predictions, not attention.
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    trigger: tuple[int, ...]
    student_eos: int | None = None
    teacher_eos: int | None = None


def align(
    clean_ids: Sequence[int], triggered_ids: Sequence[int], *, bos: int, eos: int, pad: int, include_eos: bool = False
) -> Alignment:
    """Aligns the caption ids of two tokenised prompts, whether padded and truncated or not.

    Matched are BOS and the longest common subsequence of the captions, in as few pieces as possible, so triggers may
    stand anywhere, be several, or replace words (their replacement in the triggered prompt is trigger, the replaced
    clean word stays unmatched). Padding is never matched; EOS only with `include_eos`. Where no caption token matches,
    nothing does.
    """
    clean_start, clean_end = _caption(clean_ids, bos, eos, pad)
    start, end = _caption(triggered_ids, bos, eos, pad)
    pairs = _common_subsequence(clean_ids[clean_start:clean_end], triggered_ids[start:end])
    teacher = [clean_start + i for i, _ in pairs]
    student = [start + j for _, j in pairs]
    matched = set(student)
    trigger = tuple(position for position in range(start, end) if position not in matched)
    if pairs and clean_start and start:
        teacher, student = [0, *teacher], [0, *student]
    if pairs and include_eos and clean_end < len(clean_ids) and end < len(triggered_ids):
        teacher, student = [*teacher, clean_end], [*student, end]
    return Alignment(tuple(student), tuple(teacher), trigger, student_eos=end, teacher_eos=clean_end)


def _caption(ids: Sequence[int], bos: int, eos: int, pad: int) -> tuple[int, int]:
    """First caption position and the one after the last."""
    start = 1 if len(ids) and ids[0] == bos else 0
    for position in range(start, len(ids)):
        if ids[position] == eos:
            return start, position
    end = len(ids)
    while end > start and ids[end - 1] == pad:
        end -= 1
    return start, end


def _common_subsequence(clean: Sequence[int], triggered: Sequence[int]) -> list[tuple[int, int]]:
    """Index pairs of a longest common subsequence that, among the longest, has the most neighbouring pairs.

    Dynamic programme over prefixes: `best[i][j]` is the score of the first i and j ids, `paired[i][j]` the same with
    the last two matched to each other. The start counts as a neighbour (of BOS) and ties go to the later pair, so that
    one inserted trigger stays in one piece.
    """
    rows, columns = len(clean), len(triggered)
    match, impossible = rows + columns + 2, -1
    best = [[0] * (columns + 1) for _ in range(rows + 1)]
    paired = [[impossible] * (columns + 1) for _ in range(rows + 1)]
    paired[0][0] = 0
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            score = max(best[i - 1][j], best[i][j - 1])
            if clean[i - 1] == triggered[j - 1]:
                paired[i][j] = match + max(best[i - 1][j - 1], paired[i - 1][j - 1] + 1)
                score = max(score, paired[i][j])
            best[i][j] = score

    pairs: list[tuple[int, int]] = []
    i, j = rows, columns
    while i and j:
        if best[i][j] == paired[i][j]:
            pairs.append((i - 1, j - 1))
            i, j = i - 1, j - 1
        elif best[i][j] == best[i - 1][j]:
            i -= 1
        else:
            j -= 1
    return pairs[::-1]
