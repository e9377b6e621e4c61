"""Variable tracking: one chain of five variables, and an example before it."""

import re
from random import Random

import pytest

from evals.ruler.templates import NOISE
from evals.ruler.tracing import Tracing

ASSIGNED = re.compile(r"^VAR ([A-Z]+) = (?:VAR ([A-Z]+) |(\d+))$", re.M)
START = "Memorize and track"


def draft(size=60, seed=0, example_lines=8):
    return Tracing(example_lines).draft(Random(seed), 0, size)


def chain(text):
    """Names that the value reaches, each after the one it is assigned from."""
    reached = []
    for name, of, value in ASSIGNED.findall(text):
        assert value or of == reached[-1]
        reached.append(name)
    return reached


@pytest.mark.parametrize("seed", range(20))
def test_the_chain_has_four_hops_in_order_and_its_variables_are_the_answer(seed):
    made = draft(seed=seed)
    example, problem = made.context.split(f"\n\n{START}")
    assert chain(problem) == list(made.outputs)
    assert len(set(made.outputs)) == 5
    assert all(re.fullmatch("[A-Z]{5}", name) for name in made.outputs)
    assert len(set(chain(example))) == 5
    assert all(re.fullmatch("[A-Z]{3}", name) for name in chain(example))


def test_the_value_asked_for_is_the_chain_s_and_not_the_example_s():
    for seed in range(20):
        made = draft(seed=seed)
        asked = re.search(r"the value (\d{5}) in", made.question)[1]
        assert f"VAR {made.outputs[0]} = {asked}\n" in made.context
        assert made.context.count(asked) == 1
        assert made.prefix.endswith(f"5 variables are assigned the value {asked}, they are: ")


def test_the_example_is_solved_as_a_problem_would_be():
    example = draft().context.split(f"\n\n{START}")[0]
    solution = example.split("they are: ")[1]
    assert solution == " " + " ".join(chain(example))
    assert example.count(NOISE) == 8


def test_a_size_is_the_lines_of_noise():
    for size in (5, 6, 77):
        problem = draft(size).context.split(f"\n\n{START}")[1]
        assert problem.count(NOISE) == size
        assert len(problem.rstrip("\n").split("\n")) == 2 + size + 5


def test_an_example_has_at_most_500_tokens_and_almost_as_many():
    for tokens in (len, lambda text: len(text.split())):
        recipe = Tracing.make(tokens)
        found = tokens(recipe.draft(Random(1), 0, 5).context.split(f"\n\n{START}")[0])
        shortest = recipe.example_lines == 5
        assert shortest or 480 <= found <= 500


def test_samples_differ_in_names_values_and_places():
    one, other = draft(seed=1), draft(seed=2)
    assert not set(one.outputs) & set(other.outputs)
    assert one.question != other.question
    assert not set(chain(one.context.split(f"\n\n{START}")[0])) & set(
        chain(other.context.split(f"\n\n{START}")[0])
    )
