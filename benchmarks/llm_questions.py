"""Ten plain questions in the chat template: does a compressed model answer them as the dense one does?

Both decode greedily. An answer counts as alike if it has the word that matters where the dense model's has it, and lacks it where
that lacks it; all answers are printed, to be read.

    python benchmarks/llm_questions.py DENSE FOLDER [FOLDER ...]
"""

from __future__ import annotations

import re
import sys

from dbf_compile.chat import open_conversation

QUESTIONS = {
    "What is the capital of France?": r"\bParis\b",
    "What is 2 + 3?": r"\b(5|five)\b",
    "Which planet is called the Red Planet?": r"\bMars\b",
    "Who wrote Romeo and Juliet?": r"\bShakespeare\b",
    "How many days does a week have?": r"\b(7|seven)\b",
    "What is the opposite of hot?": r"\bcold\b",
    "In which country is Tokyo?": r"\bJapan\b",
    "Which is the largest ocean on Earth?": r"\bPacific\b",
    "What do bees make?": r"\bhoney\b",
    "Write a short sentence about a dog.": r"\bdogs?\b",
}
TOKENS = 48


def answers(folder: str) -> dict[str, str]:
    conversation = open_conversation(folder, progress=False)
    found = {}
    for question in QUESTIONS:
        found[question] = conversation.ask(question, max_new_tokens=TOKENS, do_sample=False).text.strip()
        conversation.clear()
    return found


def main() -> None:
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    dense = answers(sys.argv[1])
    for folder in sys.argv[2:]:
        alike = 0
        for question, answer in answers(folder).items():
            word = re.compile(QUESTIONS[question], re.IGNORECASE)
            is_alike = bool(word.search(answer)) == bool(word.search(dense[question]))
            alike += is_alike
            print(f"{'alike' if is_alike else 'other'}  {question}")
            print(f"       dense: {dense[question]!r}\n       here:  {answer!r}")
        print(f"{folder}: {alike} of {len(QUESTIONS)} are alike", flush=True)


if __name__ == "__main__":
    main()
