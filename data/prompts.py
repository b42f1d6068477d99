"""Prompts and the response format.

    render_prompt("boxed", problem)                  the prompt as text
    encode_prompt(tokenizer, "boxed", problem)       its token ids
    format_response("6 * 7 = 42", "42")              "<think>\n6 * 7 = 42\n</think>\n\\boxed{42}"
"""

import hashlib
import re
from argparse import ArgumentTypeError
from pathlib import Path
from typing import NamedTuple

from data import load_problems
from model import did_you_mean, encode_chat, encode_text, render_chat
from verify import format_reward

# ---------------------------------------------------------------------- response format

THINK_TAGS = ("think", "thought")


def format_response(thought, answer, think_tag="think"):
    """A response in the target format: a thinking block, then the boxed answer."""
    return f"<{think_tag}>\n{thought}\n</{think_tag}>\n\\boxed{{{answer}}}"


def extract_thought(text):
    """A response's thinking block; if it has none, the whole text with its boxes unwrapped."""
    block = re.search(rf"<({'|'.join(THINK_TAGS)})>(.*?)</\1>", text, re.DOTALL)
    if not block:
        return re.sub(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1", text).strip()
    return "\n".join(line.rstrip() for line in block[2].strip().split("\n"))


def follows_format(text, think_tag="think"):
    """Whether a response is one thinking block, then one box, and nothing else.

    Stricter than format_reward, which also accepts a box without a thinking block.
    """
    return text.startswith(f"<{think_tag}>") and format_reward(text, think_tag) == 1


# ---------------------------------------------------------------------- self-refinement

# The tiny model's corpus (data/tiny/corpus.py) contains these phrases.
CHECK = "Check each step."
AGAIN = "Solve it again."
ALL_RIGHT = "Every step is right."
# Other models get longer instructions.
CHECK_LONG = (
    f'Check your solution step by step. If every step is right, write "{ALL_RIGHT}" '
    "Otherwise name the first step that is wrong and say why."
)
AGAIN_LONG = r"Solve the problem again, with this in mind. Put your final answer within \boxed{}."

# ---------------------------------------------------------------------- presets


class Preset(NamedTuple):
    """A prompt style, and the grade reported for it."""

    user: str = "{problem}"  # the user turn; the end of the prompt if `text` is set
    system: str | None = None  # the system turn, {tag} is the think tag; None: the model's default
    shots: int = 0  # number of solved problems shown as earlier turns
    text: str | None = None  # if set, the prompt is plain text that starts with these examples
    stop: tuple = ()  # strings that end a completion
    grade: str = "strict"  # "strict" or "lenient"


STEP_BY_STEP = "\nLet's think step by step."
COT = "{problem}" + STEP_BY_STEP
BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
R1 = (
    "Think about the problem first, then answer. Write your thoughts between <{tag}> and </{tag}>, "
    r"and after them the final answer within \boxed{}, like this: "
    r"<{tag}> thoughts </{tag}> \boxed{answer}."
)


def worked_examples(name):
    path = Path(__file__).with_name("few_shot") / f"{name}.txt"
    return path.read_text(encoding="utf-8") + "\n"


class Presets(dict):
    """Presets. Any text containing {problem} is also a key: a preset with that user turn."""

    def __missing__(self, name):
        if "{problem}" in name:
            return Preset(user=name)
        raise KeyError(name)


def prompt_flag(names):
    """An argparse type that accepts one of these names, or any text containing {problem}."""
    def parse(text):
        if text in names or "{problem}" in text:
            return text
        raise ArgumentTypeError(f"{text!r} is none of {', '.join(names)}, and contains no "
                                f"{{problem}}{did_you_mean(text, names)}")

    return parse


PRESETS = Presets({
    "plain": Preset(),
    "direct": Preset(user="{problem}\nAnswer with \\boxed{} only."),
    "cot": Preset(user=COT),
    "few-shot-cot": Preset(user=COT, shots=4),
    "r1": Preset(system=R1),
    "boxed": Preset(system=BOXED),  # the published zero-shot protocol of the instruct models
    "question": Preset(text=""),  # for base models: no template (Dr. GRPO, arXiv:2503.20783)
    # The first four of the eight worked examples of Wei et al. 2022, arXiv:2201.11903.
    "qwen-base-gsm8k": Preset(user="Question: {problem}\nAnswer:", stop=("Question:",),
                              text=worked_examples("gsm8k"), grade="lenient"),
    # The four worked examples of Lewkowycz et al. 2022, arXiv:2206.14858, appendix D.2.
    "minerva-math": Preset(user="Problem:\n{problem}\n\nSolution:", stop=("Problem:",),
                           text=worked_examples("minerva"), grade="lenient"),
})

# ---------------------------------------------------------------------- building prompts


def build_prompt(preset, problem, *, system=None, shots=(), think_tag="think"):
    """A plain-text prompt, or for a chat preset the messages [{"role", "content"}, ...].

    preset: a key of PRESETS. system: the system turn if the preset has none (None: no system turn).
    shots: solved problems, dicts with "problem", "solution" and "answer", shown as earlier turns.
    """
    preset = PRESETS[preset]
    question = preset.user.replace("{problem}", problem["problem"])
    if preset.text is not None:
        return preset.text + question
    if preset.system is not None:
        system = preset.system.replace("{tag}", think_tag)
    turns = [] if system is None else [("system", system)]
    for shot in shots:
        example = preset.user.replace("{problem}", shot["problem"])
        thought = re.sub(r"<<.*?>>", "", shot["solution"])  # GSM8K's calculator annotations
        reply = format_response(thought, shot["answer"], think_tag)
        turns += [("user", example), ("assistant", reply)]
    turns.append(("user", question))
    return [{"role": role, "content": content} for role, content in turns]


def render_prompt(preset, problem, **options):
    """The prompt as text; options: as for build_prompt."""
    prompt = build_prompt(preset, problem, **options)
    return prompt if isinstance(prompt, str) else render_chat(prompt, system=None)


def encode_prompt(tokenizer, preset, problem, **options):
    """The token ids of render_prompt's text. Text in a problem never becomes a control token."""
    prompt = build_prompt(preset, problem, **options)
    if isinstance(prompt, str):
        return encode_text(tokenizer, prompt)
    return encode_chat(tokenizer, prompt, system=None)


def prompt_hash(preset, **options):
    """An 8-character hash of everything in the prompt except the problem."""
    text = render_prompt(preset, {"problem": "{problem}"}, **options)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def load_shots(source, count, seed, problems):
    """`count` few-shot examples from a set's train split; a smaller count gives a prefix.

    Raises ValueError if one has no solution or is among `problems`, the ones to be solved.
    """
    shots = load_problems(source, "train", count, seed) if count else []
    texts = {p["problem"] for p in problems}
    for shot in shots:
        if shot["problem"] in texts or not shot.get("solution"):
            raise ValueError(f"{source}: example {shot['id']} has no solution, or is one of the "
                             "problems to be solved; name another set with --shots-from")
    return shots
