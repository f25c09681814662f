"""What is right, worked out from the prompt alone by other means than the families' solvers."""

from __future__ import annotations

import contextlib
import datetime
import functools
import io
import itertools
import math
import re
from collections.abc import Callable
from fractions import Fraction

import networkx

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def numbers(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"-?\d+", text)]


def prime_factors(given: str) -> str:
    number, found = int(given), []
    for divisor in range(2, 32):
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
    assert number == 1
    return " ".join(map(str, found))


def fractions(given: str) -> str:
    return str(sum(Fraction(term) for term in re.findall(r"[-+]?\d+/\d+", given)))


def versions(given: str) -> str:
    return " ".join(sorted(given.split(), key=lambda version: [int(part) for part in version.split(".")]))


def bitwise(given: str) -> str:
    value, *rest = given.split()
    for name, operand in zip(rest[::2], rest[1::2], strict=True):
        value = str(eval(f"{value} {({'and': '&', 'or': '|', 'xor': '^'})[name]} {operand}"))
    return value


def run_length(given: str) -> str:
    runs = re.finditer(r"(.)\1*", given.replace(" ", ""))
    return " ".join(f"{run[1]}{len(run[0])}" for run in runs)


def caesar(before: str, given: str) -> str:
    shift = numbers(before)[0]
    return given.translate({ord(a): _LETTERS[(i + shift) % 26] for i, a in enumerate(_LETTERS)})


def brackets(given: str) -> str:
    text = given.replace(" ", "")
    while re.search(r"\(\)|\[\]|\{\}", text):
        text = re.sub(r"\(\)|\[\]|\{\}", "", text)
    return " ".join(text[::-1].translate(str.maketrans("([{", ")]}")))


def clock(given: str) -> str:
    time = datetime.datetime(2001, 1, 1)
    for hours, minutes in re.findall(r"(\d+):(\d+)", given):
        time += datetime.timedelta(hours=int(hours), minutes=int(minutes))
    return f"{time.hour}:{time.minute:02d}"


def calendar(before: str, given: str) -> str:
    day, month = given.split()
    date = datetime.datetime.strptime(f"{day} {month} 2001", "%d %B %Y")
    left = numbers(before)[0]
    while left:
        date += datetime.timedelta(days=1)
        left -= (date.month, date.day) != (2, 29)
    return f"{date.day} {date:%B}"


def units(prompt: str) -> str:
    told, given = prompt.split(". In ")
    target, amounts = given.split(": ")
    sizes = {target: 1}
    for factor, great, small in reversed([(int(f), g, s) for g, f, s in re.findall(r"1 (\w+)=(\d+) (\w+)", told)]):
        sizes[great] = factor * sizes[small]
    return str(sum(int(amount) * sizes[name] for amount, name in re.findall(r"(\d+) ([a-z]+)", amounts)))


def turtle(given: str) -> str:
    place, heading = 0j, 1j
    for turn, distance in re.findall(r"(\w+) (\d+)", given):
        heading *= {"left": 1j, "right": -1j, "on": 1}[turn]
        place += heading * int(distance)
    return f"x={int(place.real)} y={int(place.imag)}"


def directed(given: str) -> networkx.DiGraph:
    return networkx.DiGraph([tuple(road.split(">")) for road in given.split()])


def is_shortest_path(before: str, given: str, answer: str) -> bool:
    start, goal = before.split()[-3::2]
    return answer.split() in list(networkx.all_shortest_paths(directed(given), start, goal))


def reachability(before: str, given: str) -> str:
    return " ".join(sorted(networkx.descendants(directed(given), before.split()[-1])))


def is_task_order(given: str, answer: str) -> bool:
    row = answer.split()
    pairs = re.findall(r"(\w+)([<>])(\w+)", given)
    assert sorted(row) == sorted({name for one, _, two in pairs for name in (one, two)})
    return all((row.index(one) < row.index(two)) == (sign == "<") for one, sign, two in pairs)


def is_subset_sum(before: str, given: str, answer: str) -> bool:
    chosen = numbers(answer)
    return len(set(chosen)) == len(chosen) and set(chosen) <= set(numbers(given)) and sum(chosen) == numbers(before)[0]


def liars(given: str) -> str:
    """Of all ways to be honest or not, the one that fits: small problems only."""
    known, *statements = given.split(", ")
    told = [re.match(r"(\w+) says (\w+) (\w+)", text).groups() for text in statements]
    people = sorted({known.split()[0]} | {name for statement in told for name in statement[:2]})
    fitting = []
    for honest in itertools.product((True, False), repeat=len(people)):
        is_honest = dict(zip(people, honest, strict=True))
        if is_honest[known.split()[0]] == known.endswith("honest") and all(
            is_honest[speaker] == (is_honest[about] == (claim == "honest")) for speaker, about, claim in told
        ):
            fitting.append(" ".join(person for person in people if not is_honest[person]))
    (answer,) = fitting
    return answer


def family_tree(before: str, given: str) -> str:
    start, end = before.split()[-3::2]
    tree = networkx.Graph([fact.split("<") for fact in given.split()])
    assert networkx.is_tree(tree)
    return " ".join(networkx.shortest_path(tree, start, end))


def sets(given: str) -> str:
    parts = re.split(r"([-+&])", given)
    value = set(parts[0].split())
    for sign, letters in zip(parts[1::2], parts[2::2], strict=True):
        other = set(letters.split())
        value = {"+": value.union, "-": value.difference, "&": value.intersection}[sign](other)
    return " ".join(sorted(value))


def matrix(before: str, given: str) -> str:
    modulus, *vector = numbers(before)
    for text in given.split(","):
        rows = [numbers(row) for row in text.split("/")]
        vector = [sum(a * b for a, b in zip(row, vector, strict=True)) % modulus for row in rows]
    return " ".join(map(str, vector))


def polynomial(before: str, given: str) -> str:
    modulus, x = numbers(before)
    return str(eval(re.sub(r"(?<=\d)x", "*x", given).replace("^", "**"), {"x": x}) % modulus)


def equation(given: str) -> str:
    (answer,) = [x for x in range(1, 61) if eval(given.replace("=", "=="), {"x": x})]
    return str(answer)


def differences(given: str) -> str:
    """Lagrange's polynomial through the terms, at the next place."""
    terms = numbers(given)
    total = Fraction(0)
    for i, term in enumerate(terms):
        others = [j for j in range(len(terms)) if j != i]
        total += term * math.prod(Fraction(len(terms) - j, i - j) for j in others)
    return str(total)


def stack(before: str, given: str) -> str:
    values = numbers(before)
    for instruction in given.split(", "):
        match instruction:
            case "add":
                values[-2:] = [sum(values[-2:])]
            case "sub":
                values[-2:] = [values[-2] - values[-1]]
            case "dup":
                values.append(values[-1])
            case "swap":
                values[-2:] = reversed(values[-2:])
            case "drop":
                values.pop()
            case number:
                values.append(int(number))
    return " ".join(map(str, values))


def automaton(before: str, given: str) -> str:
    cells = numbers(before)
    n = len(cells)
    for step in given.split(", "):
        one, other = {"left": (-1, 0), "right": (0, 1), "both": (-1, 1)}[step]
        cells = [(cells[(i + one) % n] + cells[(i + other) % n]) % 2 for i in range(n)]
    return " ".join(map(str, cells))


def blocks(before: str, given: str) -> str:
    piles = [pile.replace("-", "").split() for pile in before.removeprefix("Piles ").split("|")]
    for source, target in re.findall(r"(\d)>(\d)", given):
        piles[int(target) - 1].append(piles[int(source) - 1].pop())
    return " | ".join(" ".join(pile) or "-" for pile in piles)


def letter_values(given: str, answer: str) -> bool:
    values = {name: int(value) for name, value in re.findall(r"([a-z]+)=(-?\d+)", answer)}
    letters = list(dict.fromkeys(re.findall(r"[a-z]+", given)))
    assert sorted(values) == sorted(letters), "all letters, each once"
    # Every equation brings one new letter: what fits all of them is the only solution.
    filled = re.sub(r"[a-z]+", lambda letter: str(values[letter[0]]), given).replace("=", "==")
    return all(eval(text) for text in filled.split(", "))


def is_target(before: str, given: str, answer: str) -> bool:
    first, *rest = re.findall(r"[-+*]?\d+", answer)
    value = functools.reduce(lambda value, part: eval(f"({value}){part}"), rest, int(first))
    used = [int(number) for number in re.findall(r"\d+", answer)]
    return value == numbers(before)[0] and sorted(used) == sorted(numbers(given))


def is_colouring(given: str, answer: str) -> bool:
    colours = dict(re.findall(r"([a-z]+)([123])", answer))
    return all(colours[one] != colours[other] for one, other in re.findall(r"(\w+)-(\w+)", given))


def printed(code: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    return out.getvalue().strip()


def is_right(family: str, prompt: str, answer: str) -> bool:
    """Whether ``answer`` is a right answer to the prompt of a further family."""
    if family == "units":
        return answer == units(prompt)
    before, given = prompt.rsplit(": ", 1)
    from_given: dict[str, Callable[[str], str]] = {
        "gcd": lambda given: str(math.gcd(*numbers(given))),
        "prime_factors": prime_factors,
        "fractions": fractions,
        "versions": versions,
        "bitwise": bitwise,
        "run_length": run_length,
        "brackets": brackets,
        "clock": clock,
        "turtle": turtle,
        "liars": liars,
        "sets": sets,
        "equation": equation,
        "differences": differences,
    }
    if family in from_given:
        return answer == from_given[family](given)
    from_both: dict[str, Callable[[str, str], str]] = {
        "caesar": caesar,
        "calendar": calendar,
        "reachability": reachability,
        "family_tree": family_tree,
        "matrix": matrix,
        "polynomial": polynomial,
        "stack": stack,
        "automaton": automaton,
        "blocks": blocks,
    }
    if family in from_both:
        return answer == from_both[family](before, given)
    if family in ("task_order", "letter_values", "colouring"):
        return {"task_order": is_task_order, "letter_values": letter_values, "colouring": is_colouring}[family](
            given, answer
        )
    if family == "code_output":
        return answer == printed(given)
    if family == "code_input":
        return printed(given.replace("\n", f"x={int(answer)}\n", 1)) == re.search(r"print (-?\d+)$", before)[1]
    return {"shortest_path": is_shortest_path, "subset_sum": is_subset_sum, "target_number": is_target}[family](
        before, given, answer
    )
