import pytest

from qlora_sft.evaluation.grade import last_number, said


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", "18"),
        ("#### $1,234.50 a year", "1234.5"),
        ("The answer is 42.", "42"),
        ("**Answer: 3.0**", "3"),
        ("first 7, then \\boxed{12} apples, of 99", "12"),
        ("from 16 - 3 - 4 = 9 eggs", "9"),
        ("pages 5-10", "10"),
        ("it fell to -5", "-5"),
        ("x=-0", "0"),
        ("1,000,000 people", "1000000"),
        ("007", "7"),
        ("0.10", "0.1"),
        ("100", "100"),
        ("#### Step 1: add\n#### Step 2: multiply\n8 * 2 = 16\nThe answer is **16**.", "16"),
        ("#### Step 2\nso \\boxed{16}", "16"),
        ("#### 18\n\n(2 hours)", "18"),
        ("#### **18**", "18"),
        ("#### 18 apples", "18"),
        ("#### -3", "-3"),
        ("\\boxed{1{,}234}", "1234"),
        ("\\boxed{18\\text{ m}^2}", "18"),
        ("\\boxed{\\text{18}}", "18"),
        ("\\boxed{\\text{18 apples}}, of 20", "18"),
        ("\\boxed{70\\,000}", "70000"),
        ("\\boxed{70,\\!000}", "70000"),
        ("$70\\,000$", "70000"),
        ("it fell by \u22123", "-3"),
        ("#### \u22123", "-3"),
        ("#### -$5", "-5"),
        ("she lost -\\$5.50", "-5.5"),
        ("16 - $3 is $13", "13"),
        (".5", "0.5"),
        ("1/2", "0.5"),
        ("#### 3/4", "0.75"),
        ("2/3 of them", "2/3"),
        ("8/2", "4"),
        ("-4/6", "-2/3"),
        ("3 1/2 hours", "3.5"),
        ("12/0", "12/0"),
        ("on 10/20/2020", "2020"),
        ("48/2 = 24", "24"),
        ("\\boxed{\\frac{1}{2}}", "0.5"),
        ("\\boxed{-\\dfrac{2}{3}}", "-2/3"),
        ("1e3", "1000"),
        ("1.5e-3", "0.0015"),
        ("1,00,000", "100000"),
        ("1\u202f000\u202f000", "1000000"),
        ("5%", "5"),
        ("no idea", None),
        ("####", None),
    ],
)
def test_the_number_an_answer_ends_in(text: str, number: str | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "in_thought", "answer"),
    [
        ("Four.", False, "Four."),
        ("<think>2 + 2</think>\n\nFour.", False, "Four."),
        ("<think>\n\n</think>\n\nFour.", False, "Four."),
        ("2 + 2 is 4</think>Four.", True, "Four."),
        ("<think>2 + 2 is 4 and 4 is", False, ""),
        ("2 + 2 is 4 and 4 is", True, ""),
    ],
)
def test_thoughts_are_no_part_of_the_answer(text: str, in_thought: bool, answer: str) -> None:
    assert said(text, in_thought).strip() == answer
