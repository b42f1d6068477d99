"""Prompts, and the form of a response: every text that stands between a problem and a model.

    render_prompt("boxed", problem)                  the string that the model is given
    encode_prompt(tokenizer, "boxed", problem)       its token ids
    respond("6 * 7 = 42", "42")                      "<think>\n6 * 7 = 42\n</think>\n\\boxed{42}"
"""

import hashlib
import re
from argparse import ArgumentTypeError
from pathlib import Path
from typing import NamedTuple

from data import load_problems
from model import did_you_mean, encode_chat, encode_text, render_chat
from verify import format_reward

# ---------------------------------------------------------------------- the form of a response

THINK_TAGS = ("think", "thought")


def respond(thought, answer, think_tag="think"):
    """A response in the form that is taught: the thought in its block, then the answer in a box."""
    return f"<{think_tag}>\n{thought}\n</{think_tag}>\n\\boxed{{{answer}}}"


def thought_of(text):
    """The thought of a model output: its block or, without one, all of it, its boxes opened."""
    block = re.search(rf"<({'|'.join(THINK_TAGS)})>(.*?)</\1>", text, re.DOTALL)
    if not block:
        return re.sub(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1", text).strip()
    return "\n".join(line.rstrip() for line in block[2].strip().split("\n"))


def in_form(text, think_tag="think"):
    """Whether a response is one thinking block, then one box, and nothing else.

    Stricter than format_reward, which accepts a box without a thought as well.
    """
    return text.startswith(f"<{think_tag}>") and format_reward(text, think_tag) == 1


# ---------------------------------------------------------------------- checking and trying again

# The tiny model knows these phrases from its corpus (data/tiny/corpus.py) ...
CHECK = "Check each step."
AGAIN = "Solve it again."
ALL_RIGHT = "Every step is right."
# ... and other models are asked at greater length.
CHECK_LONG = (
    f'Check your solution step by step. If every step is right, write "{ALL_RIGHT}" '
    "Otherwise name the first step that is wrong and say why."
)
AGAIN_LONG = r"Solve the problem again, with this in mind. Put your final answer within \boxed{}."

# ---------------------------------------------------------------------- presets


class Preset(NamedTuple):
    """How a problem becomes a prompt, and which grade counts under that protocol."""

    user: str = "{problem}"  # the user's turn; the last block of the prompt where `text` is given
    system: str | None = None  # the system turn, {tag} is the think tag; None: the model's own
    shots: int = 0  # how many solved problems are shown as earlier turns
    text: str | None = None  # worked examples in front, or "": the prompt is plain text, no chat
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
    """Presets by name; a text of your own that holds {problem} is the user's turn of one."""

    def __missing__(self, name):
        if "{problem}" in name:
            return Preset(user=name)
        raise KeyError(name)


def prompt_flag(names):
    """An argparse type: one of these names, or a text of your own with {problem} in it."""
    def parse(text):
        if text in names or "{problem}" in text:
            return text
        raise ArgumentTypeError(f"{text!r} is none of {', '.join(names)}, nor a text with "
                                f"{{problem}} in it{did_you_mean(text, names)}")

    return parse


PRESETS = Presets({
    "plain": Preset(),
    "direct": Preset(user="{problem}\nAnswer with \\boxed{} only."),
    "cot": Preset(user=COT),
    "few-shot-cot": Preset(user=COT, shots=4),
    "r1": Preset(system=R1),
    "boxed": Preset(system=BOXED),  # the published protocol of the instruct models, no examples
    "question": Preset(text=""),  # of base models: no template (Dr. GRPO, arXiv:2503.20783)
    # The first four of the eight worked examples of Wei et al. 2022, arXiv:2201.11903.
    "qwen-base-gsm8k": Preset(user="Question: {problem}\nAnswer:", stop=("Question:",),
                              text=worked_examples("gsm8k"), grade="lenient"),
    # The four of Lewkowycz et al. 2022, arXiv:2206.14858, appendix D.2.
    "minerva-math": Preset(user="Problem:\n{problem}\n\nSolution:", stop=("Problem:",),
                           text=worked_examples("minerva"), grade="lenient"),
})

# ---------------------------------------------------------------------- from problem to prompt


def lay_out(preset, problem, *, system=None, shots=(), think_tag="think"):
    """What a model is asked: a text or, of a chat preset, turns [{"role", "content"}, ...].

    preset: a name of PRESETS. system: the system turn where the preset has none of its own (None:
    no such turn). shots: solved problems, dicts with "problem", "solution" and "answer", which
    stand before the question as earlier turns.
    """
    preset = PRESETS[preset]
    *earlier, question = (preset.user.replace("{problem}", p["problem"]) for p in [*shots, problem])
    if preset.text is not None:
        return preset.text + question
    if preset.system is not None:
        system = preset.system.replace("{tag}", think_tag)
    turns = [] if system is None else [("system", system)]
    for asked, shot in zip(earlier, shots):
        thought = re.sub(r"<<.*?>>", "", shot["solution"])  # GSM8K's calculator annotations
        turns += [("user", asked), ("assistant", respond(thought, shot["answer"], think_tag))]
    turns.append(("user", question))
    return [{"role": role, "content": content} for role, content in turns]


def render_prompt(preset, problem, **asked):
    """The text that a model is given for a problem; asked: as for lay_out."""
    prompt = lay_out(preset, problem, **asked)
    return prompt if isinstance(prompt, str) else render_chat(prompt, system=None)


def encode_prompt(tokenizer, preset, problem, **asked):
    """The token ids of render_prompt's text, in which no problem can make a control token."""
    prompt = lay_out(preset, problem, **asked)
    if isinstance(prompt, str):
        return encode_text(tokenizer, prompt)
    return encode_chat(tokenizer, prompt, system=None)


def prompt_hash(preset, **asked):
    """Eight characters that change with anything in the prompt but the problem itself."""
    text = render_prompt(preset, {"problem": "{problem}"}, **asked)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def load_shots(source, count, seed, problems):
    """`count` solved problems of a set's train split to show first; fewer are the first of more.

    Raises ValueError when one has no solution, or is among `problems`, which will be asked.
    """
    shots = load_problems(source, "train", count, seed) if count else []
    asked = {p["problem"] for p in problems}
    for shot in shots:
        fault = "is one of the problems asked" if shot["problem"] in asked else None
        if not shot.get("solution"):
            fault = "has no solution to show"
        if fault:
            raise ValueError(f"{source}: example {shot['id']} {fault}; name another set with "
                             "--shots-from")
    return shots
