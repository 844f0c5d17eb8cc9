"""Small vocabularies and made-up values: names, goods, prices, dates.

Knows nothing about pages.  Everything is drawn from the ``rng`` that is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from .step import Random

T = TypeVar("T")


def listed(text: str) -> tuple[str, ...]:
    """Names between commas, on any number of lines.

    >>> listed("a, b c,\\n d")
    ('a', 'b c', 'd')
    """
    return tuple(" ".join(part.split()) for part in text.split(","))


FIRST = listed(
    """
    Anna, Ben, Carla, David, Elena, Farid, Grace, Henry, Ines, Jonas, Kira, Leo, Maria, Noah,
    Olga, Paul, Rosa, Samir, Tara, Umar, Vera, Walter, Xenia, Yusuf, Zoe, Aisha, Bruno, Chen,
    Daria, Emil
    """
)
LAST = listed(
    """
    Adams, Becker, Costa, Diaz, Evans, Fischer, Garcia, Hansen, Ito, Jensen, Kim, Lopez,
    Meyer, Novak, Okafor, Patel, Quinn, Rossi, Silva, Tanaka, Ueda, Vargas, Weber, Young,
    Zhang, Brown, Clarke, Dubois, Larsen, Moreau
    """
)
CITIES = listed(
    """
    Berlin, Lisbon, Oslo, Cairo, Lima, Kyoto, Boston, Dublin, Geneva, Hamburg, Madrid,
    Nairobi, Prague, Quito, Rome, Seoul, Tampa, Utrecht, Vienna, Warsaw, Zurich, Austin,
    Bergen, Delhi, Essen, Fargo, Ghent, Leeds
    """
)
COUNTRIES = listed(
    """
    Brazil, Canada, Chile, China, Egypt, Finland, France, Germany, Ghana, Greece, India,
    Italy, Japan, Kenya, Mexico, Norway, Peru, Poland, Spain, Sweden, Turkey, Vietnam,
    Ireland, Austria, Belgium, Denmark
    """
)
STREETS = listed(
    """
    Oak, Elm, Station, Church, Market, Mill, River, Park, Garden, High, Lake, Hill, Bridge,
    Castle
    """
)
GOODS = listed(
    """
    Milk, Bread, Butter, Coffee, Green tea, Apples, Bananas, Rice 1kg, Orange juice, Eggs 12,
    Tomatoes, Cheese, Yogurt, Chicken soup, Pasta, Olive oil, Sugar, Salt, Honey, Chocolate,
    Notebook A5, Pencil, Battery AA, Light bulb, Soap, Shampoo, Towel, Mug, Umbrella,
    Sandwich, Espresso, Cappuccino, Salad, Muffin, Water 0.5l, Lemonade, Cookies, Onions,
    Carrots, Garlic
    """
)
SHOPS = listed(
    """
    Corner Market, Green Grocer, City Books, Sunny Cafe, North Bakery, Blue Star Diner, Hill
    Store, Old Mill Shop, Garden Center, Harbor Fish, Lucky Mart, Red Barn, Paper & Pen, Tool
    House
    """
)
COMPANIES = listed(
    """
    Northwind Ltd, Acorn Systems, Bluefield Inc, Cedar Works, Delta Foods, Evergreen AG,
    Falcon Labs, Granite Group, Horizon Media, Iris Optics, Juniper Tools, Keystone Bank
    """
)
TOPICS = listed(
    """
    Sales, Visitors, Rainfall, Exports, Energy use, Budget, Population, Downloads, Production,
    Temperature, Orders, Costs, Revenue, Students, Accidents, Imports, Votes, Steps
    """
)
UNITS = {
    "Sales": "units", "Visitors": "thousands", "Rainfall": "mm", "Exports": "tons",
    "Energy use": "kWh", "Budget": "million USD", "Population": "thousands", "Downloads": "count",
    "Production": "tons", "Temperature": "degrees C", "Orders": "count", "Costs": "EUR",
    "Revenue": "million EUR", "Students": "count", "Accidents": "count", "Imports": "tons",
    "Votes": "percent", "Steps": "count",
}  # fmt: skip
MONTHS = listed(
    """
    Jan, Feb, Mar, Apr, May, Jun, Jul, Aug, Sep, Oct, Nov, Dec
    """
)
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
SIGNS = listed(
    """
    No parking, Exit, Push, Pull, Open, Closed, Private, Danger, Keep out, No entry, One way,
    Stop, Slow down, Please wait here, Wet floor, Staff only, Ring the bell, Mind the step,
    For sale, Sold out, Fire exit, Beware of the dog, No smoking, Tickets, Toilets, Platform
    4, Gate B12, Room 204, Free Wi-Fi, Welcome, Grand opening, Sale 50% off, Coffee to go, Car
    wash, Taxi
    """
)
COMMON = listed(
    """
    about, above, after, again, answer, before, below, between, body, bring, build, carry,
    change, clear, common, country, early, enough, error, every, example, family, figure,
    follow, given, great, group, hand, history, house, idea, important, information, kind,
    language, large, later, letter, light, list, little, measure, might, money, morning, most,
    name, never, number, object, often, order, other, paper, part, people, place, point, power,
    problem, question, reason, result, return, right, second, several, simple, small, special,
    state, story, string, system, table, their, there, thing, think, under, until, value, water,
    where, which, while, without, word, world, write, year
    """
)
VERBS = listed(
    """
    shows, opens, prints, removes, adds, moves, checks, copies, saves, sends, finds, sorts, sets,
    counts, reads, writes, joins, splits, hides, repeats, starts, stops, needs, lists, locks, uses
    """
)
ADJECTIVES = listed(
    """
    current, first, last, new, old, whole, main, local, default, empty, hidden, selected, remote,
    short, long, other, next, previous, given, shared, public, private, daily, annual, average
    """
)
THINGS = listed(
    """
    file, folder, page, line, list, value, name, record, report, account, user, message, printer,
    screen, window, window title, key, address, order, item, amount, balance, device, package,
    version, number, password, script, menu, picture, table, note, date, time, price, address book
    """
)
TAILS = listed(
    """
    by name, at once, if needed, of the group, in the list, on request, before use, for all users,
    from the archive, to the server, without asking, every day, only once, at the end
    """
)
ZH_SIGNS = listed(
    """
    出口, 入口, 禁止停车, 小心地滑, 请勿吸烟, 洗手间, 售票处, 欢迎光临, 营业中,
    停车场, 安全第一, 火车站, 请排队, 图书馆, 中国银行, 人民医院, 新华书店,
    北京烤鸭, 免费停车, 推,
    拉, 小心台阶
    """
)
FORM_TITLES = listed(
    """
    Application, Registration form, Membership, Patient record, Delivery note, Order form, Job
    application, Library card, Travel request, Customer data, Complaint, Visitor pass
    """
)


def pick(rng: Random, among: Sequence[T]) -> T:
    """One of them."""
    return among[int(rng.integers(len(among)))]


def several(rng: Random, among: Sequence[T], count: int) -> list[T]:
    """So many different ones."""
    return [among[int(i)] for i in rng.permutation(len(among))[:count]]


def name(rng: Random) -> str:
    """A person's."""
    return f"{pick(rng, FIRST)} {pick(rng, LAST)}"


def remark(rng: Random) -> str:
    """A few words, as tables explain things with."""
    if rng.random() < 0.3:
        return f"{pick(rng, ADJECTIVES)} {pick(rng, THINGS)}".capitalize()
    tail = f" {pick(rng, TAILS)}" if rng.random() < 0.3 else ""
    return f"{pick(rng, VERBS)} the {pick(rng, ADJECTIVES)} {pick(rng, THINGS)}{tail}".capitalize()


def date(rng: Random) -> str:
    """In one of the usual forms."""
    y, m, d = int(rng.integers(1990, 2031)), int(rng.integers(1, 13)), int(rng.integers(1, 29))
    forms = (
        f"{y}-{m:02}-{d:02}", f"{d:02}/{m:02}/{y}", f"{d} {MONTHS[m - 1]} {y}",
        f"{MONTHS[m - 1]} {d}, {y}", f"{d:02}.{m:02}.{y}",
    )  # fmt: skip
    return pick(rng, forms)


def code(rng: Random) -> str:
    """A number with letters, as orders and members have."""
    letters = "".join(pick(rng, "ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(int(rng.integers(1, 4))))
    dash = pick(rng, ("-", "", " "))
    return f"{letters}{dash}{int(rng.integers(100, 100_000))}"


def phone(rng: Random) -> str:
    """A number to call."""
    a, b, c = (int(v) for v in rng.integers((100, 100, 1000), (1000, 1000, 10000)))
    return pick(rng, (f"({a}) {b}-{c}", f"{a}-{b}-{c}", f"+{a % 90 + 1} {b} {c}"))


def address(rng: Random) -> str:
    """A street and its number."""
    return (
        f"{int(rng.integers(1, 200))} {pick(rng, STREETS)} {pick(rng, ('Street', 'Road', 'Lane'))}"
    )


def email(rng: Random) -> str:
    """An address for mail."""
    host = pick(rng, ("mail.com", "post.net", "office.org"))
    return f"{pick(rng, FIRST)}.{pick(rng, LAST)}@{host}".lower()


def cents(rng: Random, most: int = 3000) -> int:
    """A price in hundredths, as shops like them."""
    value = int(rng.integers(20, most))
    return value - value % 10 + 9 if rng.random() < 0.5 else value


def money(value: int, sign: str = "") -> str:
    """Hundredths as a price.

    >>> money(123456, "$")
    '$1,234.56'
    """
    return f"{sign}{value / 100:,.2f}"
