"""Units of measure and currencies behind a number. They are told apart, never converted."""

import re
from functools import lru_cache

import sympy.physics.units as known
from sympy import Expr, S, Symbol

# What sympy has no word for.
ALIASES = {
    alias: unit
    for unit, aliases in {
        "inch": "in inches", "hour": "hr hrs", "minute": "min mins", "second": "sec secs", "pound": "lb lbs",
        "ounce": "oz ounce ounces", "gallon": "gal gallon gallons", "quart": "quarts", "pint": "pint pints",
        "week": "week weeks", "month": "month months", "tropical_year": "yr yrs", "ton": "ton tons",
        "acre": "acre acres", "dollar": "dollar dollars buck bucks usd", "cent": "cent cents", "yen": "yen",
        "euro": "euro euros eur", "yuan": "yuan", "rupee": "rupee rupees", "celsius": "C celsius",
        "fahrenheit": "F fahrenheit", "am": "am", "pm": "pm", "base": "base",
    }.items()
    for alias in aliases.split()
}  # fmt: skip
SHORT = {"mph": "miles per hour", "kmph": "km per hour", "kph": "km per hour", "cc": "cm^3"}
WORD = re.compile(
    r"(?P<per>/|per\b)|(?P<power>square|sq|cubic|cu)\b|(?P<name>[A-Za-zµ]+)\.?(?: ?\^?\{? ?(?P<to>\d+))?"
)
DEGREES = re.compile(r"\Adeg(?:rees?)? ?(?=[CF]\b|celsius|fahrenheit)", re.IGNORECASE)
SCALES = {Symbol("celsius"), Symbol("fahrenheit")}


@lru_cache(4096)
def measure(words: str) -> Expr | None:
    """The unit that `words` begin with, as a product of sympy's units; None where there is none ("apples")."""
    product, sign, power = S.One, 1, 1
    first, _, rest = words.partition(" ")
    for found in WORD.finditer(DEGREES.sub("", f"{SHORT.get(first, first)} {rest}")):
        if found["per"]:
            sign = -1
        elif found["power"]:
            power = 3 if found["power"].startswith("cu") else 2
        elif (quantity := _quantity(found["name"])) is not None:
            product *= quantity ** (sign * int(found["to"] or power))
            power = 1
        else:
            break
    return None if product == 1 else product


def contradict(one: tuple[Expr, ...], other: tuple[Expr, ...]) -> bool:
    """True if both name units, and not the same ones. Degrees may be of any scale, and a base may not be added."""
    if not other:
        return any(unit.has(Symbol("base")) for unit in one)
    return bool(one) and one != other and {*one, *other} - SCALES != {known.degree}


def _quantity(name: str) -> Expr | None:
    name = name if len(name) < 3 else name.lower().replace("metre", "meter").replace("litre", "liter")
    unit = ALIASES.get(name, name)
    quantity = getattr(known, unit, None)
    return quantity if isinstance(quantity, known.Quantity) else Symbol(unit) if name in ALIASES else None
