"""The course of a run: which state is the best, and how rates rise and fall."""

import math

import pytest

from dbf_compile.finetuning.training import Course, rate_share, rates_at
from dbf_compile.options import FinetuneConfig


def judged(*means):
    course = Course()
    flags = []
    for steps, (web, code) in enumerate(means):
        course.steps = steps
        flags.append(course.judge({"web": web, "code": code}))
    return course.best, flags


def test_the_best_state_has_the_smallest_mean():
    assert judged((2, 2), (1, 1.5), (1.2, 1.4), (0.5, 0.5)) == (3, [True, True, False, True])


def test_no_kind_may_be_worse_than_at_the_start():
    assert judged((2, 2), (0.1, 2.1), (1.9, 2.0)) == (2, [True, False, True])


def test_a_start_that_nothing_betters_stays_the_best():
    assert judged((2, 2), (2, 2), (3, 1)) == (0, [True, False, False])


@pytest.mark.parametrize(
    ("last", "is_lost"), [((2, 2), False), ((4, 1.9), False), ((4, 2.1), True), ((float("nan"), 1), True)]
)
def test_a_run_is_lost_that_is_far_worse_than_its_start(last, is_lost):
    course = Course()
    for course.steps, (web, code) in enumerate([(2, 2), (1, 1), last]):
        course.judge({"web": web, "code": code})
    assert course.is_lost == is_lost


@pytest.mark.parametrize("steps", [1, 2, 100])
def test_rates_rise_shortly_and_fall_to_nothing(steps):
    shares = [rate_share(step, steps) for step in range(steps)]
    assert all(0 < share <= 1 for share in shares)
    assert shares[-1] < 0.1 or steps < 10
    assert max(shares) > 0.9


@pytest.mark.parametrize(("batch", "steps"), [(1, 20_000), (4, 5000), (64, 300), (512, 40)])
def test_the_share_of_signs_that_may_flip_depends_on_tokens_alone(batch, steps):
    tokens = batch * 512
    config = FinetuneConfig(sign_rate=0.005, batch=batch)
    share = sum(rates_at(config, step, steps, tokens).signs for step in range(steps))
    assert share == pytest.approx(
        0.005 / 2 * steps * tokens / 1e6, rel=0.1
    )  # half a cosine has a mean of a half


def test_signs_flip_some_times_while_a_gradient_is_remembered_but_not_before_there_is_one():
    rates = [rates_at(FinetuneConfig(), step, 1000, 2048) for step in range(1000)]
    assert {rate.kept for rate in rates} == {math.exp(-1 / 32)}
    assert [step for step, rate in enumerate(rates[:60]) if rate.signs] == [31, 39, 47, 55]
    assert rates_at(FinetuneConfig(sign_rate=0), 31, 1000, 2048).signs == 0


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_a_short_run_remembers_no_more_than_a_quarter_of_it(steps):
    rates = [rates_at(FinetuneConfig(), step, steps, 16) for step in range(steps)]
    assert any(rate.signs for rate in rates)
    assert rates[0].kept == math.exp(-1 / max(1, steps / 4))
