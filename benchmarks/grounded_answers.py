"""What a real model makes of passages: 20 questions about articles, answered from them, from wrong ones, and alone.

    python benchmarks/grounded_answers.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --texts articles.txt

The questions are about the first articles of English Wikipedia by alphabet (Anarchism to Andre Agassi), a paragraph an
article. Prints every answer, and the share that is right (the expected words are in it), that cites a passage, and
whose claims a passage supports, by words. Wrong passages are those of another question: a control for both shares.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hfllm.grounding.answers import GroundedAnswer, answer_with_passages
from hfllm.grounding.passages import Passages
from hfllm.grounding.retrieval import BM25Retriever, Found
from hfllm.grounding.uncertainty import normalized
from hfllm.grounding.verification import all_supported, has_words, verify
from hfllm.outputs.intervals import standard_error

REQUEST = (
    "Answer from the numbered passages. Answer in one sentence, and cite the passage that says so by its number, "
    "such as [1]."
)
# Of each question the words that a right answer has.
QUESTIONS = {
    "What is the capital of Alabama?": "Montgomery",
    "Which state borders Alabama to the north?": "Tennessee",
    "In which state was Abraham Lincoln born in a log cabin?": "Kentucky",
    "Who taught Aristotle?": "Plato",
    "Which school did Aristotle found?": "Lyceum",
    "What is the capital and largest city of Algeria?": "Algiers",
    "What is the currency of Algeria?": "dinar",
    "How many characters does ASCII encode into seven-bit integers?": "128",
    "Which tennis player has Andre Agassi been married to since 2001?": "Graf",
    "In which city was Andre Agassi born?": "Las Vegas",
    "Which medal was Alain Connes awarded in 1982?": "Fields",
    "In which city was the director Allan Dwan born?": "Toronto",
    "Who wrote and illustrated the children's book Animalia?": "Graeme Base",
    "Who directed the 1997 film Actresses?": "Ventura Pons",
    "How many atomic clocks is International Atomic Time averaged over?": "400",
    "Which composer wrote An American in Paris?": "Gershwin",
    "On which date was the first Academy Awards presentation held?": "May 16",
    "Who killed Achilles near the end of the Trojan War?": "Paris",
    "Who is the twin sister of Apollo?": "Artemis",
    "What did Ayn Rand call the philosophical system that she developed?": "Objectivism",
}


class Shifted:
    """A retriever that finds for each question what another one of the same call would get."""

    def __init__(self, retriever: BM25Retriever):
        self.retriever = retriever

    def retrieve(self, queries: Sequence[str], top_k: int = 3) -> list[list[Found]]:
        """Return the passages of the question that comes seven places later."""
        found = self.retriever.retrieve(queries, top_k)
        return [found[(place + 7) % len(found)] for place in range(len(found))]


def is_right(answer: str, expected: str) -> bool:
    """Return whether the expected words are in an answer, as words."""
    return f" {normalized(expected)} " in f" {normalized(answer)} "


def figures(answers: Sequence[GroundedAnswer], top_k: int) -> dict[str, list[float]]:
    """Return for each answer whether it is right, cites, cites a passage with the words, and is supported."""
    texts = [[found.passage.text for found in answer.passages] for answer in answers]
    claims = verify([answer.answer for answer in answers], texts, has_words, threshold=0.8)
    expected = list(QUESTIONS.values())
    found = {"right": [float(is_right(each.answer, words)) for each, words in zip(answers, expected, strict=True)]}
    if top_k:
        found["cites a passage"] = [float(bool(each.cited)) for each in answers]
        found["cites one that says so"] = [
            float(any(is_right(cited.passage.text, words) for cited in each.cited))
            for each, words in zip(answers, expected, strict=True)
        ]
        found["supported"] = [float(bool(said) and all_supported(said)) for said in claims]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Answer all questions in three ways, and print answers and shares."""
    from transformers import AutoModelForCausalLM

    from hfllm.models.loading.saved import saved_model, saved_tokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--texts", type=Path, required=True, help="a text file, an article a line")
    parser.add_argument("--top_k", type=int, default=3, help="passages of a question")
    parser.add_argument("--max_tokens", type=int, default=120, help="of a passage")
    args = parser.parse_args(argv)
    tokenizer = saved_tokenizer(args.model_name_or_path)
    model = saved_model(AutoModelForCausalLM, args.model_name_or_path, dtype="float32").eval()
    passages = Passages.from_source(str(args.texts), tokenizer, max_tokens=args.max_tokens, overlap=20)
    retriever = BM25Retriever(passages)
    best = retriever.retrieve(list(QUESTIONS), args.top_k)
    has = [
        any(is_right(each.passage.text, words) for each in found)
        for found, words in zip(best, QUESTIONS.values(), strict=True)
    ]
    print(
        f"{len(passages):,} passages; the expected words are among the best {args.top_k} for {sum(has)} of {len(has)}"
    )
    for name, by, top_k in (
        ("with passages", retriever, args.top_k),
        ("with wrong ones", Shifted(retriever), args.top_k),
        ("alone", retriever, 0),
    ):
        # The request to cite is not a part of the query: it is said by the system.
        system = [{"role": "system", "content": REQUEST}] if top_k else []
        asked = [[*system, {"role": "user", "content": question}] for question in QUESTIONS]
        gate = {} if top_k else {"min_score": float("inf")}
        answers = answer_with_passages(
            model, tokenizer, asked, by, max(top_k, 1), max_new_tokens=48, batch_size=4, **gate
        )
        print(f"\n{name}:")
        for question, answer in zip(QUESTIONS, answers, strict=True):
            print(f"  {question} | {' '.join(answer.text.split())}")
        for figure, values in figures(answers, top_k).items():
            print(f"  {figure}: {sum(values) / len(values):.2f} ± {standard_error(values):.2f} (n {len(values)})")


if __name__ == "__main__":
    main()
