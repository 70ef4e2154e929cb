"""One table of strategies: for each type of Postgres, texts that its input function reads; and types made of others.

A `Kind` is a type as a column may have it. Its texts are what stands between the quotes of a literal, so that they can
be elements of arrays, fields of composites and bounds of ranges as they are. Hypothesis draws them; `nasty` are those
that a test of every type has to see. A text may be one that Postgres refuses (a range whose bounds are the wrong way
round, a date that does not exist): whoever writes rows leaves it out. What `duckdb` says is docs/types.md by hand.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

__all__ = ["BUILT_IN", "EXTENSIONS", "Kind", "array", "columns", "composite", "decimals", "domain", "enum", "ranges"]

Texts = SearchStrategy[str]


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """A type, and values of it.

    Attributes:
        sql: the type as a column has it.
        duckdb: how the warehouse holds it.
        texts: values, as their input function reads them.
        nasty: such as every test has to see.
        ddl: statements that make the type and those that it is made of, in order.
        name: in pg_type; '' of a type that is not built in.
        delimiter: of its arrays.
        array: DuckDB type of its arrays.
        ordered: there can be ranges of it.
    """

    sql: str
    duckdb: str
    texts: Texts
    nasty: tuple[str, ...]
    ddl: tuple[str, ...] = ()
    name: str = ""
    delimiter: str = ","
    array: str = ""
    ordered: bool = False

    def __str__(self) -> str:
        return self.sql


# Texts of the built-in types

_CHARACTERS = st.one_of(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    st.sampled_from("\\'\"{}[](),;: \t\n\r\v\f\b\x01\x7f\x85\xa0\u2028\ufeff\uffff\U0001f600e\u0301%$Nn.tfxu0-+=>"),
)
_TEXT = st.text(_CHARACTERS, max_size=12)
_LONG = st.builds(lambda part, times: part * times, st.text(_CHARACTERS, min_size=1, max_size=9), st.integers(1, 900))
_NASTY_TEXT = (
    "", " ", "NULL", "null", r"\N", r"\.", "it's", '"', '""', ",", ";", 'a,"b"', "{}", "{NULL}", "[0:0]={1}", "(,)",
    "back\\slash\\", "\\", "\\\\", "\\x", "line\nfeed\rreturn\r\nboth\ttab\x01\x7f\v\f\b", "\n",
    "\uffff\U0001f600e\u0301",
    "\u200d\u202e\ufeff\u2028\x85\xa0", "\U0010ffff\ud7ff\ue000", "%s {0} $1", "long '\"\\ " * 400, "infinity", "NaN",
    "x" * 8000, "é" * 3000, "<NULL>", "-", "nan", "0", "true",
)  # fmt: skip


def _whole(low: int, high: int) -> Texts:
    edges = [low, high, low + 1, high - 1, 0]
    return st.one_of(st.integers(low, high), st.integers(-9, 9).map(lambda n: max(n, low)), st.sampled_from(edges)).map(
        str
    )


_FLOAT_SPECIALS = ("NaN", "Infinity", "-Infinity", "-0", "0")
_FLOAT4 = st.one_of(st.floats(width=32).map(repr), st.sampled_from(_FLOAT_SPECIALS), _whole(-(2**25), 2**25))
_FLOAT8 = st.one_of(st.floats().map(repr), st.sampled_from(_FLOAT_SPECIALS), _whole(-(2**54), 2**54))

_NUMERIC = st.one_of(
    st.sampled_from(("NaN", "Infinity", "-Infinity", "0", "-0", "0.000", "1e131071", "1e-16383", "-1e400")),
    st.decimals(allow_nan=False, allow_infinity=False).map(lambda d: f"{d:f}" if abs(d.adjusted()) < 400 else str(d)),
    st.builds(lambda n, scale: f"{n}e-{scale}", st.integers(), st.integers(-40, 400)),
    st.builds(lambda digit, n: digit * n, st.sampled_from("1729"), st.sampled_from((40, 1000, 131072))),
)


def _money(cents: int) -> str:
    return f"{'-' if cents < 0 else ''}{abs(cents) // 100}.{abs(cents) % 100:02}"


def _hex(data: bytes) -> str:
    return f"\\x{data.hex()}"


_BYTEA = st.one_of(st.binary(max_size=20), st.builds(lambda b, n: b * n, st.binary(max_size=8), st.integers(0, 600)))

_BITS = st.text("01", max_size=70)


def _moment(year: int, month: int, day: int, time: str = "") -> str:
    """Return a date, and a time; year 0 is 1 BC."""
    return f"{year if year > 0 else 1 - year:04}-{month:02}-{day:02}{time}{'' if year > 0 else ' BC'}"


def _years(last: int) -> SearchStrategy[int]:
    odd = st.sampled_from((1582, 9999, 10000, 294246, 294247))
    return st.one_of(st.integers(-4712, last), st.integers(1890, 2040), st.integers(-2, 3), odd)


_MONTHS = st.integers(1, 12)
_DAYS = st.one_of(st.integers(1, 28), st.sampled_from((1, 28, 29, 30, 31)))
_DATE = st.one_of(
    st.builds(_moment, _years(5874897), _MONTHS, _DAYS),
    st.sampled_from(("infinity", "-infinity", "epoch", "4714-11-24 BC", "5874897-12-31", "0001-12-31 BC")),
)
_NASTY_DATE = (
    "infinity", "-infinity", "4714-11-24 BC", "0001-12-31 BC", "0001-01-01", "0004-02-29", "0005-02-29 BC",
    "9999-12-31", "10000-01-01", "5874897-12-31", "1582-10-10", "1969-12-31", "1970-01-01", "2000-02-29",
    "1900-02-28", "99999-01-01",
    "0044-03-15 BC",
)  # fmt: skip


def _clock(microseconds: int, digits: int = 6) -> str:
    seconds, fraction = divmod(microseconds, 10**6)
    clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    return f"{clock}.{fraction:06}"[: len(clock) + (1 + digits if digits else 0)]


_DAY_US = 86_400 * 10**6
_TIME = st.builds(
    _clock,
    st.one_of(st.integers(0, _DAY_US), st.sampled_from((0, _DAY_US, _DAY_US - 1, 1, 10**6 - 1, 500_000))),
    st.sampled_from((6, 0, 1, 3)),
)
_NASTY_TIME = ("00:00", "24:00:00", "23:59:59.999999", "00:00:00.000001", "12:00:00.1", "01:02:03.04")


def _zone(seconds: int) -> str:
    sign, seconds = "-" if seconds < 0 else "+", abs(seconds)
    return f"{sign}{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"


_ZONE = st.one_of(
    st.integers(-57599, 57599), st.sampled_from((0, 3600, -3600, 20700, 57599, -57599, 1, -1, 1800, -1800))
).map(_zone)

_LAST_MOMENTS = ("294247-01-10 04:00:54.775806", "294247-01-10 04:00:54.775807", "294247-01-10 04:00:54.775808")
_TIMESTAMP = st.one_of(
    st.builds(_moment, _years(294276), _MONTHS, _DAYS, _TIME.map(lambda time: f" {time}")),
    st.sampled_from(("infinity", "-infinity", "epoch", "4714-11-24 00:00:00 BC", *_LAST_MOMENTS)),
)
_NASTY_TIMESTAMP = (
    "infinity", "-infinity", "4714-11-24 00:00:00 BC", "0044-03-15 12:00 BC", "0001-12-31 23:59:59.999999 BC",
    "0001-01-01", "9999-12-31 23:59:59.999999", "10000-01-01", "1969-12-31 23:59:59.999999", "1970-01-01",
    "2024-03-31 02:30:00.12", "294247-01-10 04:00:54", *_LAST_MOMENTS, "294276-12-31 23:59:59.999999",
    "1582-10-10 00:00:00.1", "99999-12-31 24:00:00",
)  # fmt: skip
_TIMESTAMPTZ = st.one_of(
    st.builds(
        lambda moment, zone: (
            moment if moment[0] in "-ie" else f"{moment.removesuffix(' BC')}{zone}{' BC' if 'BC' in moment else ''}"
        ),
        _TIMESTAMP,
        _ZONE,
    ),
    st.builds(
        lambda year, zone: f"{year}-03-31 02:30:00.5 {zone}",
        st.integers(1850, 2050),
        st.sampled_from(("Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Pacific/Apia", "Africa/Monrovia")),
    ),
)
_NASTY_TIMESTAMPTZ = tuple(
    moment if "infinity" in moment else f"{moment.removesuffix(' BC')}+00{' BC' if 'BC' in moment else ''}"
    for moment in _NASTY_TIMESTAMP
)


def _interval(months: int, days: int, microseconds: int) -> str:
    sign = "-" if microseconds < 0 else ""
    return f"{months} mons {days} days {sign}{_clock(abs(microseconds))}"


def _near(limit: int) -> SearchStrategy[int]:
    return st.one_of(st.integers(-limit - 1, limit), st.integers(-40, 40), st.sampled_from((limit, -limit, -limit - 1)))


_INTERVAL = st.one_of(
    st.builds(_interval, _near(2**31 - 1), _near(2**31 - 1), _near(2**63 - 1)),
    st.builds(_interval, st.integers(-30, 30), st.just(0), st.integers(-(10**11), 10**11)),
    st.sampled_from(("infinity", "-infinity", "0", "1 day", "-1 mons", "1 year", "00:00:01", "-00:00:00.000001")),
)
_NASTY_INTERVAL = (
    "1 year 2 mons -3 days 04:05:06.7", "0", "-1 mons +2 days -00:00:00.000001", "-1 years +1 mon", "infinity",
    "178956970 years 7 mons 2147483647 days 2562047788:00:54.775806", "-infinity", "1 mon", "30 days", "720:00:00",
    "-178956970 years -8 mons -2147483648 days -2562047788:00:54.775807", "0.1", "-00:00:59.999999", "24:00:00",
    "-178956970 years -8 mons -2147483648 days", "1 day -00:00:01", "2562047788:00:54.775807", "1 year -1 day",
)  # fmt: skip

# JSON as text: what json keeps as it stands, and jsonb makes its own

_SPACES = st.sampled_from(("", "", "", " ", "\n", "\t", "  \r\n"))
_JSON_PART = st.one_of(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters='"\\'),
    st.sampled_from(
        (r"\n", r"\"", r"\\", r"\/", r"\b", r"\u0041", r"\u00e9", r"\u0000", r"\uFFFF", r"\\u", r"\\ud800")
    ),
    st.sampled_from((r"\ud83d\ude00", r"\uD83D\uDE00", r"\ud800", r"\uDC00", r"\udbff\udfff", "\x7f", "😀", "'")),
)
_JSON_STRING = st.lists(_JSON_PART, max_size=6).map(lambda parts: f'"{"".join(parts)}"')
_JSON_NUMBER = st.one_of(
    st.integers().map(str),
    st.sampled_from(("-0", "0.0", "1e400", "1E-400", "-1.10", "12345678901234567890123456789", "1e5", "0e0")),
)


def _json_object(spaces: Sequence[str], keys: Sequence[str], values: Sequence[str]) -> str:
    pairs = (f"{spaces[0]}{key}{spaces[1]}:{value}" for key, value in zip(keys, values, strict=False))
    return "{" + f"{spaces[2]},".join(pairs) + spaces[2] + "}"


_SPACES_3 = st.tuples(_SPACES, _SPACES, _SPACES)
_JSON = st.recursive(
    st.one_of(_JSON_STRING, _JSON_NUMBER, st.sampled_from(("null", "true", "false", "{}", "[]", '""', " [1 , 2]\n"))),
    lambda inner: st.one_of(
        st.builds(
            lambda spaces, items: f"{spaces[0]}[{f'{spaces[1]},'.join(items)}]{spaces[2]}",
            _SPACES_3,
            st.lists(inner, max_size=3),
        ),
        st.builds(
            _json_object,
            _SPACES_3,
            st.lists(st.one_of(_JSON_STRING, st.sampled_from(('"a"', '"a"', '""'))), max_size=3),
            st.lists(inner, min_size=3, max_size=3),
        ),
    ),
    max_leaves=5,
)
_NASTY_JSON = (
    '{"b" :  1, "a":1,"a":2}', "null", '""', r'"\ud83d\ude00"', "1e400", "-0", "[" * 500 + "]" * 500, " [1 , 2]\n",
    "123456789012345678901234567890", '"é😀"', "1.10", "{}", r'{"\\ud800": "\\", "": [[], {}]}', '"\x7f\u2028"',
    r'"\"\\\/\b\f\n\r\t"', "\t true \r\n", '"' + "x" * 5000 + '"', "0.1e-5", r'"\uD83D\uDE00"', "[null]",
)  # fmt: skip
_NASTY_JSON_ONLY = (
    r'"\ud800"', r'["\udc00", 1]', r'"\ude00\ud83d"', r'{"\uD800": 1}', r'"\u0000"', r'"\ud800\ud800\udc00"',
    r'"\\\ud800"', r'"\ud800x"', r'"\ud83d\u0041"', r'"\ud83d\\ude00"',
)  # fmt: skip

_JSONPATH = st.one_of(
    st.sampled_from(
        ("$", "strict $.a[*] ? (@ > 1)", r'$."x\"y"', "$.**{2 to last}.a", '$ ? (@ like_regex "^a" flag "i")', "-$[0]")
    ),
    st.builds(lambda key: f"$.{json.dumps(key)}", _TEXT),
)

_ESCAPED = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_XML = st.one_of(
    st.sampled_from(("<a/>", "<a b='1'>x</a>\n", "", " ", "text only", "<?xml version='1.0'?><a/>", "<!-- c --><a/>")),
    st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=9).map(
        lambda text: f"<a>{''.join(_ESCAPED.get(c, c) for c in text)}</a>"
    ),
    _TEXT.map(lambda text: f"<![CDATA[{text}]]>"),
)
_NASTY_XML = ("<a/>", "<é x='\"'>&lt;\n</é>", "", "<![CDATA[ \\N ]]>", "<?xml version='1.0' encoding='UTF-8'?><a>é</a>",
              "<?xml version='1.0' standalone='yes'?><a/>")  # fmt: skip


def _lexeme(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


_LEXEME = st.text(_CHARACTERS, min_size=1, max_size=6).map(_lexeme)
_TSVECTOR = st.lists(
    st.builds(lambda word, place: word + place, _LEXEME, st.sampled_from(("", ":1", ":3A,2", ":16383D", ":1,2,3B"))),
    max_size=4,
).map(" ".join)
_TSQUERY = st.recursive(
    st.builds(lambda word, how: word + how, _LEXEME, st.sampled_from(("", ":*", ":AB", ":*C"))),
    lambda inner: st.one_of(
        st.builds(lambda a, op, b: f"({a} {op} {b})", inner, st.sampled_from(("&", "|", "<->", "<3>")), inner),
        inner.map(lambda a: f"!{a}"),
    ),
    max_leaves=4,
)

_ADDRESS = st.one_of(
    st.builds(
        lambda address, bits: f"{address}/{min(bits, address.max_prefixlen)}" if bits >= 0 else str(address),
        st.ip_addresses(),
        st.integers(-1, 128),
    ),
    st.sampled_from(("::", "::ffff:1.2.3.4/128", "0.0.0.0/0", "255.255.255.255")),
)
_CIDR = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
    st.sampled_from(("10/8", "192.168.1", "::/0", "2001:db8::/32", "0.0.0.0/0")),
)


def _mac(size: int) -> Texts:
    return st.binary(min_size=size, max_size=size).map(lambda data: data.hex(":"))


_COORDINATE = st.one_of(st.floats().map(repr), st.sampled_from(("-0", "0", "1", "1e-300", "Infinity", "NaN", "0.1")))
_POINT = st.builds(lambda x, y: f"({x},{y})", _COORDINATE, _COORDINATE)
_PAIR = st.builds(lambda a, b: f"{a},{b}", _POINT, _POINT)
_POINTS = st.lists(_POINT, min_size=1, max_size=4).map(",".join)
_LINE = st.tuples(_COORDINATE, _COORDINATE, _COORDINATE).map(lambda parts: f"{{{','.join(parts)}}}")
_CIRCLE = st.builds(lambda centre, radius: f"<{centre},{radius}>", _POINT, _COORDINATE)
_NASTY_POINT = ("(1e-300,Infinity)", "(-0,NaN)", "(0,0)", "(1.1,-2.2)", "(5e-324,1.7976931348623157e308)")

_UINT4 = _whole(0, 2**32 - 1)
_TID = st.builds(lambda block, item: f"({block},{item})", st.integers(0, 2**32 - 1), st.integers(0, 65535))
_LSN = st.builds(lambda high, low: f"{high:X}/{low:X}", st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
_SNAPSHOT = st.lists(st.integers(3, 2**40), min_size=2, max_size=6, unique=True).map(
    lambda xids: f"{min(xids)}:{max(xids)}:{','.join(map(str, sorted(xids)[1:-1]))}"
)
_NASTY_SNAPSHOT = ("10:20:10,14,15", "1:1:", "3:9223372036854775807:")


# Texts of types that are made of others


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _element(text: str | None, delimiter: str) -> str:
    """Quote an element of an array where it has to be, and now and then where not."""
    if text is None:
        return "NULL"
    plain = text and text.upper() != "NULL" and not set(text) & set(f'{{}}"\\{delimiter} \t\n\r\v\f') and len(text) % 3
    return text if plain else _quoted(text)


def _field(text: str | None) -> str:
    """Quote a field of a composite, or the bound of a range."""
    if text is None:
        return ""
    return '"' + text.replace("\\", "\\\\").replace('"', '""') + '"'


def _listed(elements: Sequence[str | None], delimiter: str) -> str:
    return "{" + delimiter.join(_element(element, delimiter) for element in elements) + "}"


def _based(elements: Sequence[str | None], delimiter: str, low: int) -> str:
    return f"[{low}:{low + len(elements) - 1}]={_listed(elements, delimiter)}" if elements else "{}"


def _nested(elements: Sequence[str | None], delimiter: str, shape: Sequence[int], low: int | None) -> str:
    """Return an array of several dimensions, filled with the elements from the first on again and again."""
    supply = itertools.cycle([_element(element, delimiter) for element in elements])

    def fill(sizes: Sequence[int]) -> str:
        parts = [fill(sizes[1:]) if sizes[1:] else next(supply) for _ in range(sizes[0])]
        return "{" + delimiter.join(parts) + "}"

    bounds = "".join(f"[{low}:{low + size - 1}]" for size in shape) + "=" if low is not None else ""
    return bounds + fill(shape)


def _arrays(element: Texts, delimiter: str) -> Texts:
    some = st.lists(st.one_of(element, element, element, st.none()), max_size=4)
    one = st.lists(st.one_of(element, st.none()), min_size=1, max_size=3)
    shapes = st.lists(st.integers(1, 2), min_size=2, max_size=3)
    return st.one_of(
        some.map(lambda elements: _listed(elements, delimiter)),
        some.map(lambda elements: _listed(elements, delimiter)),
        st.builds(lambda elements, low: _based(elements, delimiter, low), some, st.sampled_from((0, 1, 2, -7))),
        st.builds(
            lambda elements, shape, low: _nested(elements, delimiter, shape, low),
            one,
            shapes,
            st.sampled_from((None, None, 1, 0)),
        ),
    )


def _nasty_arrays(nasty: Sequence[str], delimiter: str) -> tuple[str, ...]:
    parts = [list(nasty[at : at + 6]) for at in range(0, len(nasty), 6)]
    return (
        "{}",
        "{NULL}",
        *(_listed([*part, None], delimiter) for part in parts),
        *(_listed([None, text], delimiter) for text in nasty[:8]),
        _based([nasty[0], None], delimiter, 0),
        _based([nasty[0]], delimiter, 1),
        _based(nasty[:2], delimiter, -7),
        _nested([nasty[0], None, nasty[-1]], delimiter, (2, 2), None),
        _nested([nasty[-1]], delimiter, (1, 1), None),
        _nested(nasty[:3], delimiter, (1, 2, 1), 1),
        _nested(nasty[:3], delimiter, (2, 1), 0),
    )


def _range_texts(element: Texts) -> Texts:
    bound = st.one_of(element.map(_field), element.map(_field), st.just(""))
    return st.one_of(
        st.just("empty"),
        st.builds(
            lambda opening, low, high, closing: f"{opening}{low},{high}{closing}",
            st.sampled_from("[("),
            bound,
            bound,
            st.sampled_from("])"),
        ),
        element.map(lambda text: f"[{_field(text)},{_field(text)}]"),
    )


def _multirange_texts(element: Texts) -> Texts:
    return st.lists(_range_texts(element), max_size=3).map(lambda found: "{" + ",".join(found) + "}")


def _nasty_ranges(nasty: Sequence[str]) -> tuple[str, ...]:
    return (
        "empty",
        "(,)",
        *(f"[{_field(text)},{_field(text)}]" for text in nasty),
        *(f"({_field(text)},]" for text in nasty[:3]),
        *(f"(,{_field(text)})" for text in nasty[-3:]),
    )


# The table


def _kinds() -> Iterator[Kind]:
    ints = {size: (-(2 ** (8 * size - 1)), 2 ** (8 * size - 1) - 1) for size in (2, 4, 8)}

    def kind(
        name: str, duckdb: str, texts: Texts, *nasty: str, ordered: bool = False, sql: str = "", delimiter: str = ","
    ) -> Kind:
        return Kind(
            sql or name, duckdb, texts, nasty, (), name.strip('"') if sql else name, delimiter, f"{duckdb}[]", ordered
        )

    yield kind("bool", "BOOLEAN", st.sampled_from("tf"), "t", "f")
    for size, duckdb in ((2, "SMALLINT"), (4, "INTEGER"), (8, "BIGINT")):
        low, high = ints[size]
        yield kind(f"int{size}", duckdb, _whole(low, high), str(low), str(high), "0", "-1", ordered=True)
    yield kind(
        "numeric", "VARCHAR", _NUMERIC,
        "1.000", "NaN", "-Infinity", "Infinity", "1e400", "1e-400", "-0.10", "9" * 131072, "1e131071", "1e-16383", "0",
        "0.0000", "12345678901234567890123456789012345678.5",
        ordered=True,
    )  # fmt: skip
    yield kind("float4", "FLOAT", _FLOAT4, *_FLOAT_SPECIALS, "1.1", "3.4028235e38", "1e-45", "16777217", ordered=True)
    yield kind(
        "float8", "DOUBLE", _FLOAT8,
        *_FLOAT_SPECIALS, "0.1", "1e-310", "5e-324", "1.7976931348623157e308", "9007199254740993", "1e23", ordered=True,
    )  # fmt: skip
    low, high = ints[8]
    yield kind(
        "money", "VARCHAR", st.one_of(st.integers(low, high), st.integers(-200, 200)).map(_money),
        _money(low), _money(high), "1234.5", "-0.01", "0",
    )  # fmt: skip
    yield kind("text", "VARCHAR", st.one_of(_TEXT, _TEXT, _LONG), *_NASTY_TEXT, ordered=True)
    yield kind("varchar", "VARCHAR", _TEXT, *_NASTY_TEXT)
    yield kind("bpchar", "VARCHAR", _TEXT, *_NASTY_TEXT)
    yield kind("name", "VARCHAR", _TEXT, *(text[:60] for text in _NASTY_TEXT), "é" * 40)
    yield kind(
        '"char"', "VARCHAR", st.one_of(st.characters(min_codepoint=1, max_codepoint=255), st.just("")),
        "x", "", "é", r"\303", "\\", "'", '"', " ", "\n", "\x7f", "ab",
    )  # fmt: skip
    yield kind(
        "bytea", "BLOB", _BYTEA.map(_hex),
        r"\x", _hex(bytes(range(256))), r"\x5c783030", _hex(bytes(9)), _hex(b"\\N"), _hex(b"\0"), _hex(bytes(8000)),
        _hex(bytes(range(256)) * 32),
    )  # fmt: skip
    yield kind("bit", "VARCHAR", st.sampled_from("01"), "0", "1")
    yield kind("varbit", "VARCHAR", _BITS, "", "0", "1" * 4000, "0001")
    yield kind("date", "DATE", _DATE, *_NASTY_DATE, ordered=True)
    yield kind("timestamp", "TIMESTAMP", _TIMESTAMP, *_NASTY_TIMESTAMP, ordered=True)
    yield kind("timestamptz", "TIMESTAMP WITH TIME ZONE", _TIMESTAMPTZ, *_NASTY_TIMESTAMPTZ, ordered=True)
    yield kind("time", "TIME", _TIME, *_NASTY_TIME, ordered=True)
    yield kind(
        "timetz", "VARCHAR", st.builds(lambda time, zone: time + zone, _TIME, _ZONE),
        "12:00:00+05:30", "24:00:00-15:59:59", "00:00:00.000001+15:59:59", "23:59:59.9+00", ordered=True,
    )  # fmt: skip
    yield kind("interval", "INTERVAL", _INTERVAL, *_NASTY_INTERVAL, ordered=True)
    yield kind(
        "uuid", "UUID", st.uuids().map(str),
        "00000000-0000-0000-0000-000000000000", "FFFFFFFF-ffff-4fff-bfff-ffffffffffff",
        "80000000-0000-0000-0000-000000000000", "7fffffff-ffff-ffff-ffff-ffffffffffff", ordered=True,
    )  # fmt: skip
    yield kind("json", "JSON", _JSON, *_NASTY_JSON, *_NASTY_JSON_ONLY)
    yield kind("jsonb", "JSON", _JSON, *_NASTY_JSON, ordered=True)
    yield kind("jsonpath", "VARCHAR", _JSONPATH, "$", r'strict $."x\"y\n\\" ? (@ > 1)', '$ ? (@ like_regex "^a")')
    yield kind("xml", "VARCHAR", _XML, *_NASTY_XML)
    yield kind("tsvector", "VARCHAR", _TSVECTOR, "", "a:1 b:2", r"'it''s' '\\N':3A,4 '{,}' '\"'", "'é😀':16383D")
    yield kind("tsquery", "VARCHAR", _TSQUERY, "", "a & !b:*AB | (c <-> 'it''s')", r"'\\' <2> '\"'")
    yield from _range_kinds()
    yield kind("inet", "VARCHAR", _ADDRESS, "192.168.0.1/24", "2001:db8::/32", "::1", "0.0.0.0/0", ordered=True)
    yield kind("cidr", "VARCHAR", _CIDR, "10/8", "2001:db8::/32", "192.168.1.1/32")
    yield kind("macaddr", "VARCHAR", _mac(6), "08:00:2b:01:02:03", "00:00:00:00:00:00", ordered=True)
    yield kind("macaddr8", "VARCHAR", _mac(8), "08:00:2b:01:02:03:04:05", "ff:ff:ff:ff:ff:ff:ff:ff")
    yield kind("point", "VARCHAR", _POINT, *_NASTY_POINT)
    yield kind("line", "VARCHAR", _LINE, "{1,-1,0}", "{-0,1,1e300}", "{NaN,1,Infinity}")
    yield kind("lseg", "VARCHAR", _PAIR.map(lambda pair: f"[{pair}]"), "[(1,2),(-0,Infinity)]")
    yield kind("box", "VARCHAR", _PAIR, "(1,1),(0,0)", "(2,2),(-1e-300,Infinity)", "(0,NaN),(1,1)", delimiter=";")
    yield kind(
        "path", "VARCHAR", st.one_of(_POINTS.map(lambda p: f"[{p}]"), _POINTS.map(lambda p: f"({p})")),
        "[(0,0),(1,1)]", "((0,0),(1,-1),(-0,2))",
    )  # fmt: skip
    yield kind("polygon", "VARCHAR", _POINTS.map(lambda p: f"({p})"), "((0,0),(1,1),(1e-310,0))", "((0,0))")
    yield kind("circle", "VARCHAR", _CIRCLE, "<(0,0),1>", "<(NaN,-0),Infinity>")
    yield from _system_kinds(kind)


def _range_kinds() -> Iterator[Kind]:
    elements = {
        "int4range": (_whole(-(2**31), 2**31 - 1), ("-2147483648", "2147483646", "0")),
        "int8range": (_whole(-(2**63), 2**63 - 1), ("-9223372036854775808", "9223372036854775806")),
        "numrange": (_NUMERIC, ("NaN", "-Infinity", "1.0", "1e-400")),
        "daterange": (_DATE, _NASTY_DATE[2:9]),
        "tsrange": (_TIMESTAMP, _NASTY_TIMESTAMP),
        "tstzrange": (_TIMESTAMPTZ, _NASTY_TIMESTAMPTZ),
    }
    for name, (element, nasty) in elements.items():
        single = _nasty_ranges(nasty)
        yield Kind(name, "VARCHAR", _range_texts(element), single, (), name, ",", "VARCHAR[]")
        multi = name.removesuffix("range") + "multirange"
        several = ("{}", "{empty}", *(f"{{{text}}}" for text in single), f"{{{single[2]},{single[-1]}}}")
        yield Kind(multi, "VARCHAR", _multirange_texts(element), several, (), multi, ",", "VARCHAR[]")


_REGISTERED = {
    "regclass": ("pg_class", "pg_catalog.pg_type", "-", "4294967295", "information_schema.tables"),
    "regcollation": ('"C"', '"default"', "-"),
    "regconfig": ("english", "simple"),
    "regdictionary": ("simple", "english_stem"),
    "regnamespace": ("pg_catalog", "information_schema", "-"),
    "regoper": ("pg_catalog.|/", "0", "4294967295"),
    "regoperator": ("+(int4,int4)", "!!(NONE,tsquery)", "0"),
    "regproc": ("now", "-", "pg_catalog.current_database"),
    "regprocedure": ("abs(int4)", "now()", "-"),
    "regrole": ("pg_monitor", "-", "4294967295"),
    "regtype": ("int4", "timestamptz", '"char"', "int4[]", "interval", "-"),
    "aclitem": ("=r/postgres", "postgres=arwdDxt/postgres", "postgres=r*w*/postgres"),
}


def _system_kinds(kind: Callable[..., Kind]) -> Iterator[Kind]:
    for name in ("oid", "xid", "cid"):
        yield kind(name, "VARCHAR", _UINT4, "0", "4294967295", ordered=name == "oid")
    yield kind("xid8", "VARCHAR", _whole(0, 2**64 - 1), "0", "18446744073709551615")
    yield kind("tid", "VARCHAR", _TID, "(0,0)", "(4294967295,65535)")
    yield kind("pg_lsn", "VARCHAR", _LSN, "0/0", "FFFFFFFF/FFFFFFFF", ordered=True)
    for name in ("pg_snapshot", "txid_snapshot"):
        yield kind(name, "VARCHAR", _SNAPSHOT, *_NASTY_SNAPSHOT)
    yield kind("refcursor", "VARCHAR", _TEXT, *_NASTY_TEXT[:20])
    for name, texts in _REGISTERED.items():
        yield kind(name, "VARCHAR", st.sampled_from(texts), *texts)
    numbers = st.lists(st.integers(0, 32767), max_size=5).map(lambda found: " ".join(map(str, found)))
    yield kind("int2vector", "VARCHAR", numbers, "", "1 2 3", "-32768 0")
    yield kind("oidvector", "VARCHAR", numbers, "", "1 4294967295")


BUILT_IN = tuple(_kinds())
_BY_NAME = {kind.name: kind for kind in BUILT_IN}


def decimals(precision: int, scale: int) -> Kind:
    """Return numeric(precision,scale)."""
    fits = precision <= 38 and 0 <= scale <= precision
    duckdb = f"DECIMAL({precision},{scale})" if fits else "VARCHAR"
    most = 10**precision - 1
    numbers = st.one_of(
        st.integers(-most, most), st.integers(-min(most, 9), min(most, 9)), st.sampled_from((most, -most, 0))
    )
    texts = st.one_of(numbers.map(lambda n: f"{n}e{-scale}"), numbers.map(lambda n: f"{n}e{-scale}"), st.just("NaN"))
    nasty = (f"{most}e{-scale}", f"-{most}e{-scale}", f"1e{-scale}", f"-1e{-scale}", "0", "-0.0", "NaN")
    return Kind(f"numeric({precision},{scale})", duckdb, texts, nasty, (), "", ",", f"{duckdb}[]", ordered=True)


_PRECISIONS = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(0, 40)).map(lambda both: decimals(both[0], min(both))),
    st.builds(decimals, st.integers(1, 45), st.integers(-10, 45)),
    st.builds(decimals, st.sampled_from((1, 4, 5, 9, 10, 18, 19, 37, 38, 39)), st.sampled_from((0, 1, 4))),
    st.sampled_from((decimals(38, 38), decimals(38, 0), decimals(1000, 1000), decimals(1000, -1000), decimals(2, 5))),
)


def _limited(name: str, *lengths: int) -> SearchStrategy[Kind]:
    """Return a type with a length or precision; what is too long is cut or refused by Postgres."""
    head, zone = name.removesuffix("tz"), " with time zone" if name.endswith("tz") else ""
    return st.sampled_from(
        [dataclasses.replace(_BY_NAME[name], sql=f"{head}({length}){zone}", name="") for length in lengths]
    )


def _bits(length: int) -> Kind:
    texts = st.text("01", min_size=length, max_size=length)
    return Kind(f"bit({length})", "VARCHAR", texts, ("0" * length, "1" * length), (), "", ",", "VARCHAR[]")


_SCALARS: SearchStrategy[Kind] = st.one_of(
    st.sampled_from(BUILT_IN),
    st.sampled_from(BUILT_IN),
    st.sampled_from([kind for kind in BUILT_IN if kind.duckdb != "VARCHAR"]),
    _PRECISIONS,
    st.one_of(
        _limited("varchar", 1, 12, 300),
        _limited("bpchar", 1, 12, 300),
        _limited("varbit", 70, 100),
        _limited("time", 0, 3),
        _limited("timestamp", 0, 5),
        _limited("timestamptz", 0, 5),
        _limited("timetz", 0, 2),
        _limited("interval", 0, 3),
        st.sampled_from(("year to month", "day to hour", "minute to second(2)")).map(
            lambda fields: dataclasses.replace(_BY_NAME["interval"], sql=f"interval {fields}", name="")
        ),
        st.integers(1, 70).map(_bits),
    ),
)


def _extension(name: str, texts: Texts, *nasty: str, sql: str = "", ordered: bool = False) -> tuple[str, Kind]:
    ddl = (f'CREATE EXTENSION IF NOT EXISTS "{name}"',)
    return name, Kind(sql or name, "VARCHAR", texts, nasty, ddl, "", ",", "VARCHAR[]", ordered)


_LABELS = st.lists(st.text("aB_9é", min_size=1, max_size=5), max_size=4).map(".".join)
_HSTORE = st.lists(
    st.builds(
        lambda key, value: f"{_quoted(key)}=>{'NULL' if value is None else _quoted(value)}",
        _TEXT,
        st.one_of(_TEXT, st.none()),
    ),
    max_size=4,
).map(",".join)

EXTENSIONS: tuple[tuple[str, Kind], ...] = (
    _extension("hstore", _HSTORE, "", 'a=>1, "b,\\"c\\\\"=>NULL, ""=>"NULL"', '"é😀"=>"{}"'),
    _extension("citext", _TEXT, *_NASTY_TEXT, ordered=True),
    _extension("ltree", _LABELS, "", "Top.Science.Astronomy", "a", ordered=True),
    _extension("ltree", st.sampled_from(("*.a.*", "a|b{1,3}", "!x.*{2}")), "*.a@*.b|c{1,2}", sql="lquery"),
    _extension("cube", _POINT, "(1,2),(3,4)", "(-0)", "()"),
    _extension("seg", st.sampled_from(("1", "1..2", "~1 .. <2", "1.00(+-)0.1")), "1", "<1", "1.00 .. 2"),
    _extension("isn", st.sampled_from(("0-393-04002-X", "1413304540")), "0-393-04002-X", sql="isbn"),
    _extension("vector", st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=4).map(str), "[1,2.5,-0]", "[1e-30]"),
)
"""By extension, a type that it brings."""


# Types of users


def _label(name: str) -> str:
    return "'" + name.replace("'", "''") + "'"


def enum(name: str, labels: Sequence[str]) -> Kind:
    """Return CREATE TYPE ... AS ENUM."""
    ddl = f"CREATE TYPE {name} AS ENUM ({', '.join(map(_label, labels))})"
    return Kind(name, "VARCHAR", st.sampled_from(labels), tuple(labels), (ddl,), "", ",", "VARCHAR[]", ordered=True)


def domain(name: str, over: Kind) -> Kind:
    """Return CREATE DOMAIN; of an array as well, but arrays of such a domain are lists of text."""
    listed = over.array if not over.duckdb.endswith("[]") else "VARCHAR[]"
    ddl = (*over.ddl, f"CREATE DOMAIN {name} AS {over.sql}")
    return dataclasses.replace(over, sql=name, ddl=ddl, name="", array=listed, ordered=False)


def array(of: Kind) -> Kind:
    """Return an array."""
    return Kind(
        f"{of.sql}[]", of.array, _arrays(of.texts, of.delimiter), _nasty_arrays(of.nasty, of.delimiter), of.ddl,
        "", of.delimiter, of.array,
    )  # fmt: skip


def composite(name: str, fields: Sequence[Kind]) -> Kind:
    """Return CREATE TYPE ... AS (...)."""
    ddl = f"CREATE TYPE {name} AS ({', '.join(f'f{number} {field.sql}' for number, field in enumerate(fields))})"
    texts = st.tuples(*(st.one_of(field.texts, field.texts, st.none()) for field in fields)).map(
        lambda values: f"({','.join(map(_field, values))})"
    )
    most = max(len(field.nasty) for field in fields)
    nasty = [f"({','.join(_field(f.nasty[at] if at < len(f.nasty) else None) for f in fields)})" for at in range(most)]
    nothing = f"({','.join('' for _ in fields)})"
    made = tuple(dict.fromkeys(statement for field in fields for statement in field.ddl))
    return Kind(name, "VARCHAR", texts, (*nasty, nothing), (*made, ddl), "", ",", "VARCHAR[]")


def ranges(name: str, of: Kind, *, multi: bool) -> Kind:
    """Return CREATE TYPE ... AS RANGE, or the type of multiranges that comes with it."""
    ddl = (*of.ddl, f"CREATE TYPE {name} AS RANGE (subtype = {of.sql}, multirange_type_name = {name}_multi)")
    single = _nasty_ranges(of.nasty)
    if not multi:
        return Kind(name, "VARCHAR", _range_texts(of.texts), single, ddl, "", ",", "VARCHAR[]")
    several = ("{}", *(f"{{{text}}}" for text in single))
    return Kind(f"{name}_multi", "VARCHAR", _multirange_texts(of.texts), several, ddl, "", ",", "VARCHAR[]")


_ENUM_LABELS = st.lists(
    st.one_of(
        st.text(_CHARACTERS, max_size=9),
        st.sampled_from(("", "NULL", "null", "a,b", 'q"q', "it's", "{}", "\\N", " ", "x" * 63, "é" * 31)),
    ).filter(lambda label: len(label.encode()) <= 63),
    min_size=1,
    max_size=5,
    unique=True,
)
_HOWS = ("scalar",) * 6 + ("array",) * 4 + ("domain", "enum", "composite", "range", "extension")


@st.composite
def columns(draw: st.DrawFn, name: str, extensions: Sequence[str], depth: int = 0) -> Kind:
    """Return any type, built in or made of others; the types of users in it are called after `name`.

    Args:
        extensions: what the server has.
    """
    how = draw(st.sampled_from(_HOWS)) if depth < 3 else "scalar"

    def inner(suffix: str) -> Kind:
        return draw(columns(f"{name}_{suffix}", extensions, depth + 1))

    if how == "domain":
        return domain(name, inner("d"))
    if how == "enum":
        return enum(name, draw(_ENUM_LABELS))
    if how == "composite":
        return composite(name, [inner(f"f{number}") for number in range(draw(st.integers(1, 3)))])
    of = inner("e") if how in ("array", "range") else None
    if how == "array" and of is not None and not of.sql.endswith("[]"):
        of = array(of)
    elif how == "range" and of is not None and of.ordered:
        of = ranges(name, of, multi=draw(st.booleans()))
    there = [kind for extension, kind in EXTENSIONS if extension in extensions]
    return of or draw(st.sampled_from(there) if how == "extension" and there else _SCALARS)
