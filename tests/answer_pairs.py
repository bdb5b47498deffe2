"""(what is said, gold answer) by verdict and by what the pairs are about. Written for this project."""

RIGHT = {
    "numbers": [
        ("72", "72"), ("-7", "-7"), ("−7", "-7"), ("+7", "7"), ("007", "7"), ("3.0", "3"), ("3.50", "3.5"),
        (".5", "0.5"), ("1/2", "0.5"), ("\\frac{1}{2}", "1/2"), ("\\dfrac{1}{2}", "\\frac{1}{2}"),
        ("\\tfrac12", "0.5"), ("½", "0.5"), ("\\frac12", "\\frac{1}{2}"), ("-\\frac{3}{4}", "-0.75"),
        ("\\frac{-3}{4}", "-\\frac{3}{4}"), ("2 1/2", "2.5"), ("2\\frac{1}{2}", "\\frac{5}{2}"),
        ("0.333333", "\\frac{1}{3}"), ("3*4", "12"), ("3 \\times 4", "12"), ("3 × 4", "12"), ("12 ÷ 4", "3"),
        ("2**10", "1024"), ("2^{10}", "1024"), ("5!", "120"), ("\\binom{20}{10}", "184756"), ("\\binom 5 2", "10"),
        ("3^{2^3}", "6561"), ("2^{100}", "4^{50}"), ("10^{12}", "1000000000000"),
        ("12345678901234567890", "12345678901234567890"), ("6.02 \\times 10^{23}", "6.02 \\cdot 10^{23}"),
        ("20!", "20 \\cdot 19!"),
    ],
    "separators": [
        ("1,000", "1000"), ("1000", "1,000"), ("1,234,567", "1234567"), ("1{,}000", "1000"), ("1\\,000", "1000"),
        ("1 000 000", "1000000"), ("12,345.5", "12345.5"), ("$1,000$", "1000"),
    ],
    "marks": [
        ("$72$", "72"), ("\\(72\\)", "72"), ("\\[72\\]", "72"), ("$$72$$", "72"), ("**72**", "72"), ("72.", "72"),
        (" 72\n", "72"), ("\\boxed{72}", "72"), ("$\\boxed{72}$", "72"), ("\\boxed{\\boxed{72}}", "72"),
        ("\\boxed{\\frac{3}{4}}", "0.75"), ("The answer is \\boxed{72}.", "72"),
        ("\\boxed{\\text{The answer is } 72}", "72"), ("72", "\\boxed{72}"), ("72", "$72$"),
        ("first \\boxed{72}, so again \\boxed{72}", "72"), ("\\left( 1, 2 \\right)", "(1,2)"), ("\\text{72}", "72"),
    ],
    "prose": [
        ("The answer is 72.", "72"), ("the answer: 72", "72"), ("**Answer:** 72", "72"), ("Final answer = 72", "72"),
        ("The answer to both questions is 72.", "72"), ("The answer is:\n\n\\[ \\frac{1}{2} \\]", "0.5"),
        ("The answer is $x+1$.", "x+1"), ("The answer is x+1. We are done.", "x+1"), ("She makes $18.", "18"),
        ("She sells 9 eggs for $2 each, so she makes $18.", "18"), ("so 16 - 3 - 4 = 9 eggs", "9"),
        ("So it is $\\frac{3}{4}$ then", "0.75"), ("The answer is 12 apples for 3 children.", "12"),
        ("It is not 3; we find 5", "5"), ("The answer is \\frac{1}{2} because of that", "0.5"),
        ("There are 3 pens in each of 4 boxes, 3 x 4 = 12 in all", "12"),
        ("First 3. The answer is 4. The answer is 5.", "5"),
    ],
    "units": [
        ("5", "5 cm"), ("5 cm", "5"), ("5\\text{ cm}", "5 cm"), ("5 centimeters", "5 cm"),
        ("5\\ \\mathrm{cm}", "5\\text{ cm}"), ("5 meters", "5"), ("5 apples", "5"), ("5 red apples", "5 apples"),
        ("5\\text{ cm}^2", "5\\text{ cm}^2"), ("5 cm^2", "5 square centimeters"), ("60 km/h", "60"),
        ("The answer is 5 hours.", "5 hours"), ("\\frac{1}{2} hours", "0.5"), ("90^\\circ", "90"),
        ("90°", "90^{\\circ}"), ("90", "90^\\circ"), ("90 degrees", "90°"), ("$18", "18"), ("\\$18", "$18$"),
        ("18 dollars", "\\$18"), ("$\\$18$", "18"), ("€5", "5"), ("$1,250.50", "1250.5"),
    ],
    "percent": [
        ("50%", "50"), ("50\\%", "0.5"), ("50 percent", "50\\%"), ("50", "50%"), ("0.5", "50\\%"),
        ("12.5 per cent", "12.5\\%"),
    ],
    "algebra": [
        ("(x+1)^2", "x^2+2x+1"), ("2(x+1)", "2x+2"), ("y=2x+1", "y = 2x + 1"), ("2x+1", "y=2x+1"), ("x = 5", "5"),
        ("5", "x=5"), ("\\sqrt{8}", "2\\sqrt{2}"), ("sqrt(8)", "2\\sqrt{2}"), ("√2", "\\sqrt{2}"),
        ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}{2}"), ("2pi", "2\\pi"), ("2π", "2\\pi"),
        ("\\sin^2 x + \\cos^2 x", "1"), ("e^{2x}", "(e^x)^2"), ("x<3", "3>x"), ("3+4i", "4i+3"), ("|x|", "|x|"),
        ("x = 1/2 = 0.5", "0.5"), ("\\log_2 8", "3"), ("x² + 1", "x^2+1"), ("\\infty", "∞"), ("(n+1)!", "(n+1)!"),
    ],
    "several parts": [
        ("3, 5", "3,5"), ("5, 3", "3, 5"), ("3 or 5", "3, 5"), ("$3$ and $5$", "3,5"), ("x = 3 or x = 5", "3, 5"),
        ("\\{1, 2\\}", "\\{2,1\\}"), ("\\boxed{3} and \\boxed{5}", "3, 5"), ("(1,2)", "(1, 2)"), ("[1,2)", "[1, 2)"),
        ("(-∞, 3)", "(-\\infty, 3)"), ("(1,2) \\cup (3,4)", "(1,2)\\cup(3,4)"), ("\\pm 3", "3, -3"),
        ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}"),
        ("\\begin{bmatrix}1\\\\2\\end{bmatrix}", "\\begin{pmatrix}1\\\\\\frac{4}{2}\\end{pmatrix}"),
        ("1, 2, and 3", "1,2,3"), ("5, 5.0", "5"), ("10:30", "10:30"),
    ],
    "choices": [
        ("B", "B"), ("(B)", "B"), ("B.", "B"), ("B)", "B"), ("\\text{B}", "B"), ("\\boxed{\\text{(B)}}", "B"),
        ("$B$", "B"), ("The answer is B", "B"), ("The answer is (B) 12.", "B"), ("Option B is right", "B"),
        ("B", "(B)"), ("B", "\\textbf{(B)}"), ("I think it is B", "B"), ("**B**", "B"),
    ],
    "words": [
        ("yes", "Yes"), ("YES.", "yes"), ("\\text{yes}", "yes"), ("No", "no"),
        ("The answer is **Tuesday**.", "Tuesday"), ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}"),
        ("no solution", "No solution"),
    ],
    "text of what is not evaluated": [
        ("2^{2023}", "2^{2023}"), ("2023!", "2023!"), ("2^{20230} - 1", "2^{20230}-1"), ("$9^{9^{9}}$", "9^{9^{9}}"),
        ("\\sum_{k=1}^{n} k!", "\\sum_{k=1}^{n} k!"), ("The answer is $\\dfrac{2023!}{7}$", "\\frac{2023!}{7}"),
    ],
}  # fmt: skip

WRONG = {
    "values": [
        ("71", "72"), ("-72", "72"), ("0.33", "\\frac{1}{3}"), ("7.2", "72"), ("172", "72"), ("2/1", "\\frac{1}{2}"),
        ("2^{11}", "1024"), ("x+2", "x+1"), ("x", "y"), ("y=5", "x=5"), ("x>5", "5"), ("\\sqrt{3}", "\\sqrt{2}"),
        ("5x", "5"), ("51%", "50"), ("1,00", "100"),
    ],
    "several candidates": [
        ("3 or 5", "3"), ("3 or 5", "5"), ("The answer is 3, or maybe 5", "3"), ("The answer is 3, or maybe 5", "5"),
        ("3, 5", "5"), ("$3$ or $5$", "5"), ("The answer is 3. Or 5.", "3"), ("either 3 or 5", "5"),
        ("\\boxed{3} or \\boxed{5}", "3"), ("\\boxed{3} \\boxed{5}", "5"), ("0 1 2 3 4 5 6 7 8 9", "9"),
        ("0 1 2 3 4 5 6 7 8 9", "6"), ("1, 2, 3, 4, 5", "5"), ("1 2", "3"), ("1 2", "12"), ("3 = 5", "5"),
        ("1 = 2 = 5", "5"), ("x = 3 = 5", "5"), ("5; 6", "5"), ("\\{3, 5\\}", "5"), ("x=3 or x=5", "5"),
        ("3 and 5", "3"), ("\\pm 5", "5"), ("5 = 5.0 = 6", "5"), ("[0, 10]", "5"),
        ("The answer is 3 and also 5", "5"),
    ],
    "order and bounds": [
        ("(2,1)", "(1,2)"), ("[1,2]", "[1,2)"), ("(1,3)", "(1,2)"), ("1,2", "1,2,3"), ("1,2,3", "1,2"),
        ("x<3", "x\\le 3"), ("\\begin{pmatrix}1&2\\\\4&3\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"),
    ],
    "denied": [
        ("The answer is not 5", "5"), ("It isn't 5", "5"), ("It is never equal to 5", "5"),
    ],
    "units": [
        ("5 meters", "5 cm"), ("5 hours", "5 minutes"), ("500 cm", "5 m"), ("18 cents", "18 dollars"),
        ("5 cm^3", "5 cm^2"),
    ],
    "choices": [
        ("A or B", "B"), ("A, B", "B"), ("A/B", "B"), ("ABCD", "B"), ("$A \\cdot B$", "B"), ("$ABC$", "B"),
        ("(A) (B) (C) (D)", "B"), ("A", "B"), ("b", "B"), ("B+1", "B"), ("Better", "B"), ("2", "B"), ("", "B"),
        ("A B C", "B"),
    ],
    "words": [
        ("no", "yes"), ("yes or no", "yes"), ("yes no", "yes"), ("Monday or Tuesday", "Tuesday"), ("noy", "yon"),
        ("e s y", "yes"), ("", "yes"),
    ],
    "malformed": [
        ("", "72"), (" ", "72"), ("\\frac{1}{2", "\\frac{1}{2}"), ("\\boxed{72", "72"), ("\\boxed{}", "72"),
        ("72 {", "72"), ("none", "72"), ("\\frac{72}{}", "72"), ("^72", "72"), ("7 2", "72"), ("?", "72"),
        ("$$", "72"), ("\\", "72"), ("x=", "72"),
    ],
    "work left undone": [
        ("\\int_0^1 x dx", "\\frac{1}{2}"), ("\\sum_{k=1}^{10} k", "55"), ("\\prod_{k=1}^{3} k", "6"),
        ("\\lim_{x\\to 0} \\frac{\\sin x}{x}", "1"),
    ],
    "no value": [
        ("\\frac{0}{0}", "0"), ("1/0", "5"), ("nan", "5"), ("\\infty", "5"), ("x=x", "x=5"), ("0=0", "x=5"),
    ],
}  # fmt: skip

UNSCORABLE = [
    "proof left to the reader", "", " ", "\\frac{1}{2", "\\boxed{", "5 apples and 3 oranges", "$", "\\",
    "See the figure above for details.", None, [], ["", "proof left to the reader"],
]  # fmt: skip
