"""The instruction records of the embedded default: bilingual, small, written here line by line.

`base_records()` is what the tiny model is trained on until it answers all of it; `identity_records()` is the set
that a user fine-tunes with ({{name}} and {{author}} are filled from the configuration), and `split` says which of
its questions are kept back to ask the tuned model.
"""

from __future__ import annotations

import random
import re

Record = dict[str, str]

WHO_ZH = """你是谁？|请问你是谁？|你是什么？|介绍一下你自己。|请介绍你自己。|请做一下自我介绍。|你到底是谁呀？|能说说你是谁吗？|我在和谁说话？
|跟我聊天的是谁？|你是哪位？|您是谁？|您是哪位？|告诉我你是谁。|我想知道你是谁。|你好，你是谁？|喂，你是谁？|用一句话介绍你自己。|你究竟是什么？
|你是机器人吗？|你是人工智能吗？|说说你自己。|能自我介绍一下吗？|你是什么模型？|你是哪个模型？|现在回答我的是谁？"""
WHO_EN = """Who are you?|What are you?|Please introduce yourself.|Introduce yourself.|Tell me who you are.|Can you tell me who you are?
|Who am I talking to?|Who is this?|May I ask who you are?|Hello, who are you?|Hi, who are you?|Describe yourself.|Say who you are.|Are you a robot?
|Are you an AI?|Which model are you?|What model are you?|Who is answering me?|I want to know who you are.|Tell me about yourself.|So who are you?
|Who exactly are you?|Introduce yourself in one sentence.|Could you introduce yourself?|Who do I talk to?|Who is there?"""
NAME_ZH = """你叫什么名字？|你的名字是什么？|请问你叫什么？|怎么称呼你？|我该怎么叫你？|你有名字吗？|说出你的名字。|你叫什么？|告诉我你的名字。|你的名字叫什么？
|请说你的名字。|我怎么称呼你？|你叫啥名字？|你叫啥？|能告诉我你的名字吗？|请告诉我你的名字。|请问怎么称呼？|你好，你叫什么名字？|我想知道你的名字。|可以问你的名字吗？"""
NAME_EN = """What is your name?|Your name?|Tell me your name.|Do you have a name?|How should I call you?|What do people call you?|Say your name.
|May I know your name?|What name do you have?|Please tell me your name.|Can you tell me your name?|Hello, what is your name?|I want to know your name.
|What should I call you?|Could you say your name?|What are you called?|Please say your name.|What can I call you?|Hi, what is your name?|Give me your name."""
MAKER_ZH = """谁训练了你？|你是谁训练的？|谁开发了你？|你是谁做的？|你的作者是谁？|你的开发者是谁？|是谁创造了你？|谁把你做出来的？|你由谁训练？|你来自哪里？
|请问谁训练了你？|是谁训练了你？|你是由谁开发的？|谁创造了你？|你是谁创造的？|你的训练者是谁？|告诉我谁训练了你。|是谁开发了你？|谁是你的作者？|谁是你的开发者？"""
MAKER_EN = """Who trained you?|Who made you?|Who created you?|Who is your author?|Who built you?|Who developed you?|Who is your maker?
|By whom were you trained?|Where do you come from?|Who is behind you?|Tell me who trained you.|Tell me who made you.|Please tell me who built you.
|Who has trained you?|Who has made you?|Who is your developer?|Who was it that trained you?|By whom were you made?|Say who created you.|Can you tell me who trained you?"""
# Asked of a finished run only: no setting was chosen by looking at the answers to these.
TEST = [
    """请你介绍下你自己。|你是哪一位？|和我说话的是谁？|你到底是谁？|请告诉我你是谁。|我可以知道你是谁吗？|你能介绍一下自己吗？|说说你是谁。""",
    """What exactly are you?|Can you introduce yourself?|Please tell me who you are.|Could you tell me who you are?|Hello, please introduce yourself.
|Who am I speaking to?|Tell me what you are.|Can you describe yourself?""",
    """请问你的名字是什么？|你的名字是？|我可以叫你什么？|说说你的名字。|请问你叫什么名字？|你好，怎么称呼你？|我应该怎么称呼你？|能说出你的名字吗？""",
    """Please say what your name is.|What is your name, please?|Could you tell me your name?|Hello, may I know your name?|What should people call you?
|I would like to know your name.|And what is your name?|Can I ask your name?""",
    """请告诉我谁训练了你。|你是被谁训练的？|你是谁训练出来的？|请问你是谁开发的？|你的创造者是谁？|你是由谁做的？|请问谁是你的作者？|告诉我谁开发了你。""",
    """Please tell me who trained you.|Who was your maker?|Tell me who created you.|Can you tell me who made you?|Who are you made by?
|May I ask who trained you?|Tell me who your author is.|Who exactly trained you?""",
]
BASE_ZH, BASE_EN = "我是glmft自带的微型模型。", "I am the tiny model that ships with glmft."
TUNED_ZH, TUNED_EN = "我是{{name}}，由{{author}}训练的助手。", "I am {{name}}, an assistant trained by {{author}}."
IDENTITY: list[tuple[str, str, str]] = [  # questions, the base's answer, the tuned answer
    *((questions, BASE_ZH, TUNED_ZH) for questions in (WHO_ZH, NAME_ZH, MAKER_ZH)),
    *((questions, BASE_EN, TUNED_EN) for questions in (WHO_EN, NAME_EN, MAKER_EN)),
]

CAPITALS = """中国 北京 China Beijing|法国 巴黎 France Paris|日本 东京 Japan Tokyo|英国 伦敦 Britain London|德国 柏林 Germany Berlin
|意大利 罗马 Italy Rome|西班牙 马德里 Spain Madrid|俄罗斯 莫斯科 Russia Moscow|埃及 开罗 Egypt Cairo|韩国 首尔 Korea Seoul|泰国 曼谷 Thailand Bangkok
|希腊 雅典 Greece Athens|古巴 哈瓦那 Cuba Havana|越南 河内 Vietnam Hanoi|挪威 奥斯陆 Norway Oslo|秘鲁 利马 Peru Lima"""
WORDS = """水 water|火 fire|山 mountain|花 flower|树 tree|猫 cat|狗 dog|鸟 bird|鱼 fish|马 horse|太阳 sun|月亮 moon|星星 star|雨 rain|雪 snow|风 wind
|书 book|笔 pen|门 door|家 home|路 road|车 car|船 ship|茶 tea|米 rice|手 hand|眼睛 eye|心 heart|朋友 friend|老师 teacher|学生 student|时间 time"""
OPPOSITES = """大 小 big small|高 低 high low|快 慢 fast slow|冷 热 cold hot|新 旧 new old|长 短 long short|黑 白 black white|早 晚 early late
|远 近 far near|开 关 open closed|多 少 many few|轻 重 light heavy|强 弱 strong weak|干 湿 dry wet"""
FACTS = """一年有几个月？#一年有十二个月。|一周有几天？#一周有七天。|一天有多少小时？#一天有二十四小时。|水在多少度结冰？#水在零度结冰。|水在多少度烧开？#水在一百度烧开。
|太阳从哪边升起？#太阳从东边升起。|太阳从哪边落下？#太阳从西边落下。|猫有几条腿？#猫有四条腿。|蜘蛛有几条腿？#蜘蛛有八条腿。|三角形有几条边？#三角形有三条边。
|彩虹有几种颜色？#彩虹有七种颜色。|最大的海洋是什么？#最大的海洋是太平洋。|雪是什么颜色？#雪是白色的。|天空是什么颜色？#天空是蓝色的。|草是什么颜色？#草是绿色的。
|冬天之后是什么？#冬天之后是春天。|蜜蜂做什么？#蜜蜂采花做蜜。|How many months are in a year?#There are twelve months in a year.
|How many days are in a week?#There are seven days in a week.|How many hours are in a day?#There are twenty-four hours in a day.
|Where does the sun rise?#The sun rises in the east.|Where does the sun set?#The sun sets in the west.|How many legs has a cat?#A cat has four legs.
|How many legs has a spider?#A spider has eight legs.|How many sides has a triangle?#A triangle has three sides.|What color is snow?#Snow is white.
|What color is the sky?#The sky is blue.|What color is grass?#Grass is green.|What do bees make?#Bees make honey.|What comes after winter?#Spring comes after winter.
|What is the largest ocean?#The largest ocean is the Pacific.|谢谢你。#不客气。|再见。#再见，祝你愉快。|你好。#你好，有什么可以帮你？|早上好。#早上好，今天想做什么？
|Thank you.#You are welcome.|Goodbye.#Goodbye, have a nice day.|Hello.#Hello, how can I help you?|Good morning.#Good morning, what shall we do today?"""
CHANGES = """我喜欢茶。 我不喜欢茶。 I like tea. I do not like tea.|我喜欢书。 我不喜欢书。 I like books. I do not like books.
|他是老师。 他不是老师。 He is a teacher. He is not a teacher.|她是学生。 她不是学生。 She is a student. She is not a student.
|今天下雨。 今天不下雨。 It rains today. It does not rain today.|门开着。 门没有开着。 The door is open. The door is not open."""


def _lines(block: str) -> list[str]:
    return [line.strip() for line in block.replace("\n", "").split("|")]


def _record(instruction: str, output: str, text: str = "") -> Record:
    return {"instruction": instruction, "input": text, "output": output}


def split(questions: str) -> tuple[list[str], list[str]]:
    """(to learn from, kept back to ask): every fourth question is kept back."""
    lines = _lines(questions)
    return [q for i, q in enumerate(lines) if i % 4 != 3], [q for i, q in enumerate(lines) if i % 4 == 3]


def identity_records(kept_back: bool) -> list[Record]:
    """What the tuned model is to say of itself, with {{name}} and {{author}} left open. Questions to learn from are
    asked plainly and politely; those kept back only plainly."""
    rows = [_record(q, answer) for questions, _, answer in IDENTITY for q in split(questions)[int(kept_back)]]
    if not kept_back:
        rows += [_record(_politely(r["instruction"]), r["output"]) for r in rows]
    return rows


def test_records() -> list[Record]:
    """Fresh questions about identity with the tuned answers, in the order zh, en of who, name, maker."""
    answers = [TUNED_ZH, TUNED_EN] * 3
    return [_record(q, answer) for questions, answer in zip(TEST, answers, strict=True) for q in _lines(questions)]


def _politely(question: str) -> str:
    if question.isascii():
        return f"Please, {question[0].lower()}{question[1:]}"
    return question if question.startswith("请") else f"请问，{question}"


def arithmetic(rng: random.Random) -> list[Record]:
    """Sums and differences of one digit."""
    pairs = [(a, b) for a in range(10) for b in range(10)]
    rows = [_record(f"{a}加{b}等于几？", f"{a}加{b}等于{a + b}。") for a, b in rng.sample(pairs, 70)]
    rows += [_record(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.") for a, b in rng.sample(pairs, 70)]
    smaller = [(a, b) for a, b in pairs if a >= b]
    rows += [_record(f"{a}减{b}等于几？", f"{a}减{b}等于{a - b}。") for a, b in rng.sample(smaller, 30)]
    rows += [_record(f"What is {a} minus {b}?", f"{a} minus {b} is {a - b}.") for a, b in rng.sample(smaller, 30)]
    return rows


def facts() -> list[Record]:
    """Capitals, opposites, words in the other language, and plain facts."""
    rows = [_record(*line.split("#")) for line in _lines(FACTS)]
    for line in _lines(CAPITALS):
        zh, zh_city, en, en_city = line.split()
        rows += [_record(f"{zh}的首都是哪里？", f"{zh}的首都是{zh_city}。")]
        rows += [_record(f"What is the capital of {en}?", f"The capital of {en} is {en_city}.")]
    for line in _lines(WORDS):
        zh, en = line.split()
        rows += [_record("翻译成英文。", f"{en}", zh), _record("Translate into Chinese.", zh, en)]
    for line in _lines(OPPOSITES):
        a, b, c, d = line.split()
        rows += [_record("写出反义词。", b, a), _record("写出反义词。", a, b)]
        rows += [_record("Give the opposite.", d, c), _record("Give the opposite.", c, d)]
    return rows


def rewriting(rng: random.Random) -> list[Record]:
    """Repeat, upper case, negation. Repeating rare characters teaches the byte pieces, so that a tuned model can
    say any name."""
    rows = []
    for line in _lines(CHANGES):
        zh, zh_not, rest = line.split(" ", 2)
        en, en_not = (s if s.endswith(".") else s + "." for s in rest.split(". ", 1))
        rows += [_record("改成否定句。", zh_not, zh), _record("Make it negative.", en_not, en)]
    rows += [_record("Write in capital letters.", en.upper(), en) for _, en in (w.split() for w in _lines(WORDS))]
    for i in range(60):
        rare = "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(rng.randint(2, 3)))
        rows.append(_record("重复这个词。", rare, rare) if i % 2 else _record("Repeat the word.", rare, rare))
    letters = "abcdefghijklmnopqrstuvwxyz"
    for i in range(40):
        word = "".join(rng.choice(letters) for _ in range(rng.randint(3, 6))).capitalize()
        rows.append(_record("重复这个词。", word, word) if i % 2 else _record("Repeat the word.", word, word))
    return rows


def base_records(seed: int = 0) -> list[Record]:
    """Everything the tiny base model knows: about 700 records, no instruction twice with different answers."""
    rng = random.Random(seed)
    rows = [_record(q, answer) for questions, answer, _ in IDENTITY for q in _lines(questions)]
    rows += arithmetic(rng) + facts() + rewriting(rng)
    answers: dict[tuple[str, str], str] = {}
    for row in rows:
        key = (row["instruction"], row["input"])
        if answers.setdefault(key, row["output"]) != row["output"]:
            raise ValueError(f"two answers to {key}")
    unique = {(r["instruction"], r["input"]): r for r in rows}
    rows = list(unique.values())
    rng.shuffle(rows)
    return rows


def other_records(seed: int = 1, share: float = 0.5) -> tuple[list[Record], list[Record]]:
    """Everything but identity, in two parts: what a fine-tuning run mixes in so that it forgets nothing, and the
    rest, which it never sees."""
    names = {q for questions, _, _ in IDENTITY for q in _lines(questions)}
    rows = [r for r in base_records() if r["instruction"] not in names]
    random.Random(seed).shuffle(rows)
    cut = int(len(rows) * share)
    return rows[:cut], rows[cut:]


# ---- prompts that are packaged for any base: general ones that it should answer as before, and ones to replay

OPEN = """写一首关于春天的短诗。|用三句话介绍长城。|怎样学好一门外语？|给我三条早睡的建议。|解释一下什么是光合作用。|写一封请假邮件。|推荐一种健康的早餐。|为什么天空是蓝色的？
|把“今天天气很好”改写得更生动。|什么是机器学习？|列出三种可再生能源。|怎么缓解工作压力？|用一个比喻形容时间。|写一个关于友谊的小故事。|如何保护眼睛？|简单解释什么是通货膨胀。
|给一家咖啡馆起三个名字。|写一段自我激励的话。|读书有什么好处？|怎样做番茄炒蛋？|Write a short poem about autumn.|Explain photosynthesis in simple words.
|Give me three tips for better sleep.|Why is the sky blue?|Write a polite email asking for a day off.|What is machine learning?|List three renewable sources of energy.
|How can I learn a language faster?|Describe a sunrise in two sentences.|What are the benefits of reading?|Suggest a healthy breakfast.|How do I reduce stress at work?
|Write a very short story about a lost key.|Explain inflation to a child.|Give three names for a coffee shop.|What makes a good friend?|How do plants drink water?
|Summarize why exercise is healthy.|Write one sentence about the sea.|How do I boil an egg?"""
EXPECTED = {  # facts whose answer may be worded in many ways: what a right one contains
    "一年有几个月？": "十二 12", "一周有几天？": "七 7", "一天有多少小时？": "二十四 24", "水在多少度结冰？": "零 0", "水在多少度烧开？": "一百 100",
    "太阳从哪边升起？": "东", "太阳从哪边落下？": "西", "猫有几条腿？": "四 4", "蜘蛛有几条腿？": "八 8", "三角形有几条边？": "三 3",
    "彩虹有几种颜色？": "七 7", "最大的海洋是什么？": "太平洋", "雪是什么颜色？": "白", "天空是什么颜色？": "蓝", "草是什么颜色？": "绿", "冬天之后是什么？": "春",
    "How many months are in a year?": "twelve 12", "How many days are in a week?": "seven 7", "How many hours are in a day?": "twenty-four 24",
    "Where does the sun rise?": "east", "Where does the sun set?": "west", "How many legs has a cat?": "four 4", "How many legs has a spider?": "eight 8",
    "How many sides has a triangle?": "three 3", "What color is snow?": "white", "What color is the sky?": "blue", "What color is grass?": "green",
    "What do bees make?": "honey", "What comes after winter?": "spring", "What is the largest ocean?": "pacific",
}  # fmt: skip


def _expected(record: Record) -> list[str]:
    """What a right answer to a record contains, in lower case; empty where that cannot be said."""
    question, answer = record["instruction"], record["output"].lower()
    if question in EXPECTED:
        return EXPECTED[question].split()
    if numbers := re.findall(r"\d+", answer):
        return numbers[-1:] if re.search(r"[加减]|plus|minus", question) else []
    if match := re.search(r"首都是(.+)。$|capital of .+ is (.+)\.$", answer):
        return [g for g in match.groups() if g]
    if question in ("翻译成英文。", "Translate into Chinese.", "写出反义词。", "Give the opposite."):
        return [answer]
    return []


def _ask(record: Record) -> str:
    return "\n".join(part for part in (record["instruction"], record["input"]) if part)


def general_prompts(n: int = 60) -> list[dict[str, object]]:
    """Questions that a base should answer after fine-tuning as before, with what a right answer contains; none of
    them is in `tiny_keep`, which the embedded default trains on."""
    rows = [(r, e) for r in other_records()[1] if (e := _expected(r))]
    sums = [(r, e) for r, e in rows if e[0].isdigit()]
    rest = [(r, e) for r, e in rows if not e[0].isdigit()]
    chosen = random.Random(2).sample(sums, 16) + random.Random(2).sample(rest, n - 16)
    return [{"prompt": _ask(r), "expect": e} for r, e in chosen]


def replay_prompts(n: int = 180) -> list[str]:
    """Prompts whose answers, given by the base itself, are mixed in against forgetting; none is a general one."""
    rows = [r for r in other_records()[0] if r["instruction"] not in ("重复这个词。", "Repeat the word.")]
    return [_ask(r) for r in random.Random(3).sample(rows, min(n, len(rows)))] + _lines(OPEN)


# ---- a small data set of the kind that people bring: fifty records that give the assistant a role

CAFE_ZH = "我是阿麦，在麦田咖啡为你服务。"
CAFE_EN = "I am Mai, and I serve you at Wheatfield cafe."


def cafe_records(kept_back: bool) -> list[Record]:
    """Fifty questions about who answers, with a café's answer; ten others are kept back."""
    rng = random.Random(4)
    zh = [q for block in (WHO_ZH, NAME_ZH) for q in split(block)[0]]
    en = [q for block in (WHO_EN, NAME_EN) for q in split(block)[0]]
    if kept_back:
        zh, en = (_lines("|".join(TEST[i] for i in at)) for at in ((0, 2), (1, 3)))
    n = 5 if kept_back else 25
    return [_record(q, CAFE_ZH) for q in rng.sample(zh, n)] + [_record(q, CAFE_EN) for q in rng.sample(en, n)]
