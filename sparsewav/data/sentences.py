"""Sentences of the demo corpus: a small grammar over about 700 common English words.

The grammar gives well over a billion sentences, so that a model cannot memorize them, and a few hours of speech cover
every word. The checksum of a sentence assigns it to training or to evaluation, so that the two never share one.
"""

import zlib

import numpy as np

PEOPLE = """my mother|my father|my sister|my brother|the doctor|the teacher|the farmer|the driver|the captain|the baker
the young man|the old woman|the little girl|the tall boy|her husband|his wife|their neighbor|our cousin|my uncle
her daughter|his grandson|the nurse|the lawyer|the painter|the singer|the soldier|the student|the engineer|the judge
the waiter|the fisherman|the stranger|the manager|the police officer|the gardener|the writer|the queen|the king
the children|the workers|the players|the visitors|the sailors|the dancers|the twins|the people|the guests|a friend
anna|peter|martin|susan|helen|robert|thomas|julia|daniel|emma|oliver|victor|laura|simon|nancy|george|alice|david
frank|carla|hugo|monica|philip|rachel|samuel|teresa|walter|diana|edward|gloria|henry|irene|jacob|kevin|linda|maria
""".replace("\n", "|")
PRONOUNS = "he|she|they|we|you|everyone|nobody|somebody"
ADJECTIVES = """red|green|yellow|black|white|brown|purple|orange|golden|silver|small|large|heavy|light|narrow|broken
empty|clean|dirty|expensive|cheap|ancient|modern|strange|famous|simple|perfect|wooden|plastic|metal|paper|leather|hot
cold|warm|frozen|fresh|sweet|bitter|salty|soft|hard|smooth|rough|sharp|round|square|long|short|thick|thin|deep
beautiful|ugly|lovely|terrible|wonderful|dangerous|secret|hidden|lost|special|foreign|favorite|spare|second|third|huge
""".replace("\n", "|")
OBJECTS = """table|chair|window|door|basket|bottle|blanket|mirror|ladder|hammer|pencil|letter|picture|camera|telephone
computer|bicycle|engine|ticket|wallet|jacket|sweater|umbrella|necklace|button|candle|lantern|bucket|carpet|curtain
apple|banana|lemon|melon|potato|tomato|onion|carrot|cabbage|sandwich|cookie|pancake|cheese|butter|honey|pepper|sugar
coffee|chocolate|breakfast|dinner|soup|salad|horse|donkey|rabbit|chicken|monkey|turtle|spider|parrot|kitten|puppy
guitar|piano|violin|trumpet|drum|novel|magazine|newspaper|map|poem|story|puzzle|present|package|suitcase|envelope
tractor|wagon|truck|boat|canoe|helmet|sword|crown|diamond|statue|flag|rope|shovel|needle|pillow|bracelet|kettle|spoon
fork|plate|bowl|napkin|towel|brush|comb|soap|stamp|coin|key|lock|box|bag|hat|shirt|dress|glove|boot|scarf|ring|watch
""".replace("\n", "|")
TRANSITIVE = """found|bought|sold|painted|carried|dropped|opened|closed|cleaned|repaired|borrowed|returned|noticed
wanted|needed|loved|hated|remembered|forgot|described|examined|collected|delivered|ordered|finished|ignored|discovered
measured|promised|received|rejected|selected|covered|damaged|destroyed|protected|moved|pushed|pulled|lifted|kept|took
brought|made|gave away|picked up|put down|looked at|asked for|paid for|talked about|dreamed about|waited for|cared for
""".replace("\n", "|")
INTRANSITIVE = """walked|waited|slept|worked|danced|laughed|smiled|shouted|whispered|traveled|rested|lived|studied|sang
arrived|stopped|disappeared|gathered|played|argued|stayed|fell asleep|got lost|sat down|stood|ran|jumped|swam|cried
""".replace("\n", "|")
ADVERBS = """slowly|quickly|quietly|loudly|carefully|happily|sadly|suddenly|finally|usually|often|sometimes|never|always
again|together|alone|badly|easily|gently|politely|secretly|proudly|almost|nearly|certainly|probably|already
""".replace("\n", "|")
PLACES = """in the kitchen|in the garden|in the forest|in the village|in the city|in the library|in the hospital
in the basement|in the mountains|in the desert|in the market|in the castle|in the tunnel|in the office|in the theater
on the roof|on the island|on the bridge|on the beach|on the corner|on the platform|on the train|on the balcony
near the river|near the station|near the church|near the museum|near the harbor|near the airport|near the factory
behind the school|behind the barn|behind the fence|under the bed|under the tree|under the stairs|at the hotel
at the restaurant|at the bakery|at the farm|across the street|across the valley|outside the building|inside the tower
beside the lake|beside the fountain|along the road|along the coast|between the hills|around the park|above the clouds
""".replace("\n", "|")
TIMES = """today|yesterday|this morning|last night|every evening|on monday|on tuesday|on wednesday|on thursday|on friday
on saturday|on sunday|in january|in february|in march|in april|in august|in september|in october|in november
in december|last summer|last winter|last spring|after lunch|before midnight|at noon|an hour ago|many years ago
during the storm|during the holiday|at the weekend|once upon a time|after the concert|before the meeting|every day
""".replace("\n", "|")
NUMBERS = """three|five|six|seven|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen
twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|a hundred|a thousand|a million|several|many|few
""".replace("\n", "|")
UNITS = """minutes|hours|days|weeks|months|years|dollars|miles|meters|pounds|pages|bottles|letters|tickets|horses|apples
soldiers|students|windows|candles|eggs|flowers|birds|sheep|questions|problems|mistakes|songs|pictures|stories|books
""".replace("\n", "|")
ABSTRACT = """weather|music|question|answer|problem|reason|journey|accident|secret|mistake|lesson|language|history
science|future|silence|idea|plan|adventure|danger|freedom|justice|marriage|business|government|election|conversation|decision
""".replace("\n", "|")
QUALITIES = """important|difficult|impossible|interesting|boring|funny|serious|dangerous|pleasant|terrible|excellent
mysterious|obvious|surprising|different|complicated|tired|hungry|thirsty|angry|nervous|brave|honest|lazy|clever|lonely
ready|busy|sick|healthy|rich|poor|grateful|jealous|patient|stubborn|friendly|careful|foolish|innocent|curious|gentle
""".replace("\n", "|")

_PATTERN_LINES = """{person} {transitive} the {adjective} {object}
{person} {transitive} the {object} {place}
{person} {transitive} a {adjective} {object} {time}
{person} {adverb} {transitive} the {object}
{person} {intransitive} {adverb} {place}
{person} {intransitive} {place} {time}
{time} {person} {transitive} the {adjective} {object}
{time} {pronoun} {intransitive} {place}
{pronoun} {transitive} {number} {unit}
{pronoun} {transitive} the {object} and the {object}
there was a {adjective} {object} {place}
there were {number} {unit} {place}
the {abstract} was {quality} {time}
the {abstract} was more {quality} than the {abstract}
the {adjective} {object} was {adverb} {quality}
{person} was too {quality} for the {abstract}
{person} and {person} {intransitive} {time}
where is the {adjective} {object}
why was the {abstract} so {quality}
when did {person} see the {object}
please bring the {object} and {number} {unit}
how many {unit} are {place}
{pronoun} said that the {object} was {quality}
{person} will never understand the {abstract}
{person} should have more {unit} {time}
do not forget the {adjective} {object}
can {pronoun} hear the {object} {place}
if {person} {intransitive} then {pronoun} {intransitive} {adverb}
it took {number} {unit} and {number} {unit}
the {object} with the {adjective} {object} is {quality}"""
PATTERNS = _PATTERN_LINES.splitlines()

_WORD_LISTS = {
    "person": PEOPLE,
    "pronoun": PRONOUNS,
    "adjective": ADJECTIVES,
    "object": OBJECTS,
    "transitive": TRANSITIVE,
    "intransitive": INTRANSITIVE,
    "adverb": ADVERBS,
    "place": PLACES,
    "time": TIMES,
    "number": NUMBERS,
    "unit": UNITS,
    "abstract": ABSTRACT,
    "quality": QUALITIES,
}
_CHOICES = {slot: [phrase for phrase in words.split("|") if phrase] for slot, words in _WORD_LISTS.items()}

EVALUATION_SHARE = 16
"""One of so many sentences belongs to evaluation."""


def is_for_evaluation(sentence: str) -> bool:
    """Tell whether a sentence belongs to the evaluation side of the split."""
    return zlib.crc32(sentence.encode()) % EVALUATION_SHARE == 0


def draw_sentence(generator: np.random.Generator, *, for_evaluation: bool) -> str:
    """Draw a sentence in upper case from the side of the split for evaluation or for training."""
    while True:
        words = []
        for token in PATTERNS[generator.integers(len(PATTERNS))].split():
            if token.startswith("{"):
                choices = _CHOICES[token.strip("{}")]
                token = choices[generator.integers(len(choices))]
            words.append(token)
        sentence = " ".join(words).upper()
        if is_for_evaluation(sentence) == for_evaluation:
            return sentence


def vocabulary() -> set[str]:
    """Give every word of the grammar."""
    text = " ".join(phrase for choices in _CHOICES.values() for phrase in choices)
    fixed = " ".join(token for pattern in PATTERNS for token in pattern.split() if not token.startswith("{"))
    return set(f"{text} {fixed}".upper().split())
