"""Web pages written for these tests, each with the text that a reader of the page came for.

`PAGES` maps a name to (HTML, text). What surrounds the text (menus, banners, lists of other articles, comments,
scripts) is of a different make on each page, as on the web.
"""

MILL = (
    "The old mill below the bridge has ground no corn since the flood of 1953, and yet its wheel still turns.",
    "Every spring the village cleans the channel, which silts up within a year, and sets the wheel free again.",
    "Nobody is paid for the work. The miller's granddaughter brings bread and cider, and the school sends its oldest "
    "class to carry stones.",
    "Last year the council asked an engineer whether the wheel could drive a generator. She measured the fall of the "
    "water for a week and said that it would light eleven houses in winter, and four in a dry summer.",
    "The village voted for it by forty hands to nine. Work on the new shaft begins after the harvest.",
)
BEES = (
    "A colony of bees decides where to live much as a committee should. Some hundred scouts fly out, and each that "
    "finds a hollow tree comes back and dances for it.",
    "The better the hollow, the longer the dance. Others follow the dance, look at the place for themselves, and "
    "dance "
    "for it only if they agree.",
    "Support for poor places dies away, because each bee dances a little less every time that she returns.",
    "When some twenty scouts meet at one hollow, the swarm warms its wings and goes, often within the hour.",
)
SOUP = (
    "This soup is from my aunt, who cooked on the ferries and had to feed forty people from one pot.",
    "Fry the onions slowly in the butter until they are soft and golden, which takes at least twenty minutes.",
    "Add the potatoes and the stock, and let it simmer until a fork goes through the potatoes without effort.",
    "Stir in the smoked fish and the cream, and never let it boil after that, or the cream will split.",
    "It tastes better on the second day, if there is any left by then.",
)
ZEIT = (
    "Der Leuchtturm auf der Nordspitze der Insel wird seit vierzig Jahren nicht mehr bewohnt, aber sein Licht brennt.",
    "Zweimal im Jahr fährt ein Techniker hinüber, prüft die Lampen und schreibt das Wetter in ein Buch, das noch der "
    "letzte Wärter begonnen hat.",
    "Im Sommer dürfen Besucher hinauf. Die Treppe hat einhundertzwölf Stufen, und oben sieht man bei klarer Luft bis "
    "zum Festland.",
    "Der Verein sucht Freiwillige, die an den Wochenenden Karten verkaufen und die Fenster vom Salz befreien.",
)
JA = (
    "この村の図書館は、使われなくなった駅の中にあります。",
    "本棚は昔の待合室に並び、切符売り場が受付になりました。毎週土曜日には、子どもたちのために物語を読む会が開かれます。",
    "線路の跡は散歩道になり、春には桜を見に多くの人が訪れます。図書館を始めたのは、元駅長の山田さんです。",
    "山田さんは、列車が来なくなっても、人が集まる場所を残したかったと話しています。",
)


def paragraphs(texts: tuple[str, ...]) -> str:
    return "".join(f"<p>{text}</p>\n" for text in texts)


def words(*texts: str) -> str:
    return "\n".join(texts)


def menu(*names: str) -> str:
    return "<ul>" + "".join(f'<li><a href="/{name.lower()}">{name}</a></li>' for name in names) + "</ul>"


def article(head: str, before: str, body: str, after: str) -> str:
    return f"<!DOCTYPE html>\n<html lang='en'><head>{head}</head>\n<body>{before}{body}{after}</body></html>"


TEASERS = "".join(
    f'<div class="teaser"><a href="/{n}"><h4>{title}</h4></a><span>{n} min read</span></div>'
    for n, title in enumerate(("Five ways to save on heating", "What the new bus times mean", "Photos of the fair"), 2)
)
COMMENTS = (
    '<div id="comments" class="comments"><h3>3 comments</h3><ol class="commentlist">'
    '<li class="comment"><b>river_rat</b> says: First! Great piece, thanks for sharing this with us all.</li>'
    '<li class="comment"><b>Anna</b> says: my grandfather worked there, does anybody have pictures?</li>'
    '<li class="comment"><b>Tom</b> says: waste of money if you ask me, we need a new road.</li></ol>'
    '<form><textarea name="c">Write a comment</textarea><button>Send</button></form></div>'
)

PAGES: dict[str, tuple[str, str]] = {}

PAGES["article with menus, sidebar and footer"] = (
    article(
        "<title>The mill turns again | Valley News</title><style>.nav{float:left}</style>",
        f'<header><div class="logo">Valley '
        f"News</div><nav>{menu('Home', 'News', 'Sport', 'Weather', 'Jobs')}</nav></header>"
        f'<div class="sidebar" id="sidebar"><h3>Most read</h3>{TEASERS}</div>',
        f'<article class="post"><h1>The mill turns again</h1>{paragraphs(MILL)}</article>',
        f'<div class="related">{TEASERS}</div><footer>Copyright Valley News. '
        f"{menu('Imprint', 'Privacy', 'Contact')}</footer>",
    ),
    words("The mill turns again", *MILL),
)
PAGES["page inside one form, as ASP.NET writes it"] = (
    article(
        "<title>Council minutes</title>",
        '<form method="post" action="./minutes.aspx" id="aspnetForm"><div>'
        '<input type="hidden" name="__VIEWSTATE" value="dDwtMTA4MzE0MjEwNTs7Pg==" /></div>'
        f'<div id="topnav">{menu("Council", "Services", "Maps", "Forms")}</div>',
        f'<div id="ctl00_content"><h1>The wheel and the vote</h1>{paragraphs(MILL)}</div>',
        '<div id="search"><input type="text" /><input type="submit" value="Search" /></div></form>',
    ),
    words("The wheel and the vote", *MILL),
)
PAGES["prose in the field sets of a form"] = (
    article(
        "<title>How bees choose</title>",
        '<form action="/quiz" method="post">',
        f"<fieldset><legend>Reading</legend><h1>How bees choose</h1>{paragraphs(BEES)}</fieldset>",
        '<select name="class"><option>Class 5</option><option>Class 6</option></select>'
        '<input type="submit" value="Next page"></form>',
    ),
    words("How bees choose", *BEES),
)
PAGES["form first, search box and newsletter beside it"] = (
    article(
        "<title>Aunt's soup</title>",
        '<form class="search" action="/s"><input name="q"><button>Go</button></form>'
        f'<div class="navbar">{menu("Recipes", "Shop", "About")}</div>',
        f"<main><h1>Soup from the ferries</h1>{paragraphs(SOUP)}</main>",
        '<form class="newsletter"><p>Get a recipe every week!</p><input '
        'type="email"><button>Subscribe</button></form>',
    ),
    words("Soup from the ferries", *SOUP),
)
PAGES["data in a table"] = (
    article(
        "<title>Fall of the water</title>",
        f'<div class="menu">{menu("Start", "Data", "Archive")}</div>',
        f"<div class='content'><h1>Fall of the water</h1><p>{MILL[3]}</p><p>These are her figures for the week, taken "
        "at noon each day beside the old gate:</p><table><tr><th>Day</th><th>Fall in metres</th><th>Flow</th></tr>"
        "<tr><td>Monday</td><td>2.41</td><td>strong</td></tr><tr><td>Tuesday</td><td>2.38</td><td>strong</td></tr>"
        f"<tr><td>Wednesday</td><td>2.02</td><td>weak</td></tr></table><p>{MILL[4]}</p></div>",
        '<div class="footer">Updated daily. <a href="/rss">RSS</a></div>',
    ),
    words(
        *(
            "Fall of the water",
            MILL[3],
            "These are her figures for the week, taken at noon each day beside the old gate:",
        ),
        *("Day Fall in metres Flow", "Monday 2.41 strong", "Tuesday 2.38 strong", "Wednesday 2.02 weak", MILL[4]),
    ),
)
PAGES["laid out by tables, as in 1999"] = (
    "<html><head><title>Bees</title></head><body bgcolor=#ffffcc><table width=100%><tr><td colspan=2><center><font "
    "size=6>Gerda's Bee Page</font></center></td></tr><tr><td width=120 valign=top><a href=1.htm>Honey</a><br><a href="
    "2.htm>Hives</a><br><a href=3.htm>Guestbook</a></td><td><font face=Arial>"
    + "<br><br>\n".join(BEES)
    + "</font></td></tr></table><hr><font size=1>You are visitor 004211. Best viewed with "
    "800x600.</font></body></html>",
    words("Gerda's Bee Page", *BEES),
)
PAGES["lists"] = (
    article(
        "<title>Ferry soup for forty</title>",
        f"<nav class='top'>{menu('Breakfast', 'Lunch', 'Dinner')}</nav>",
        f"<article><h1>Ferry soup for forty</h1><p>{SOUP[0]}</p><h2>What you need</h2><ul><li>six kilos of floury "
        "potatoes, peeled and cut small</li><li>two kilos of smoked haddock, without skin and bones</li><li>a "
        "pound of "
        "butter and three litres of cream</li></ul><h2>What you do</h2><ol>"
        + "".join(f"<li>{step}</li>" for step in SOUP[1:4])
        + f"</ol><p>{SOUP[4]}</p></article>",
        "<div class='share'><a>Share</a> <a>Tweet</a> <a>Pin it</a></div>",
    ),
    words(
        *("Ferry soup for forty", SOUP[0], "What you need", "six kilos of floury potatoes, peeled and cut small"),
        *("two kilos of smoked haddock, without skin and bones", "a pound of butter and three litres of cream"),
        *("What you do", *SOUP[1:]),
    ),
)
PAGES["comments below"] = (
    article(
        "<title>Mill votes</title>",
        f"<div role='navigation'>{menu('Front page', 'Opinion', 'Subscribe')}</div>",
        f"<div class='entry-content'>{paragraphs(MILL)}</div>",
        COMMENTS + "<div id='footer'>Powered by a blog engine. Theme by nobody.</div>",
    ),
    words(*MILL),
)
PAGES["code"] = (
    article(
        "<title>Counting words</title>",
        f"<nav>{menu('Docs', 'API', 'Blog')}</nav>",
        "<article><h1>Counting words in a large file</h1><p>The obvious way reads the whole file and splits it, which "
        "needs several times its size in memory. Reading line by line needs almost none:</p><pre><code>counts = {}\n"
        "for line in open(path):\n    for word in line.split():\n        counts[word] = counts.get(word, 0) + 1\n"
        "</code></pre><p>The loop is slower than a counter from the standard library, but it shows what happens. "
        "Words "
        "that differ only in case are counted apart, so lower the line first if that matters to you.</p><p>For files "
        "that several programs write at once, open a copy instead: a line may be half written when you read "
        "it.</p></article>",
        "<footer>Edit this page on the forge</footer>",
    ),
    words(
        "Counting words in a large file",
        "The obvious way reads the whole file and splits it, which needs several times its size in memory. "
        "Reading line "
        "by line needs almost none:",
        "counts = {} for line in open(path): for word in line.split(): counts[word] = counts.get(word, 0) + 1",
        "The loop is slower than a counter from the standard library, but it shows what happens. Words that "
        "differ only "
        "in case are counted apart, so lower the line first if that matters to you.",
        "For files that several programs write at once, open a copy instead: a line may be half written when you "
        "read it.",
    ),
)
PAGES["German, with umlauts as entities"] = (
    article(
        "<meta charset=utf-8><title>Leuchtturm</title>",
        f"<div id='navigation'>{menu('Startseite', 'Ausflüge', 'Verein', 'Impressum')}</div>",
        "<div id='inhalt'><h1>Licht ohne W&auml;rter</h1>"
        + paragraphs(ZEIT).replace("ä", "&auml;").replace("ü", "&#252;").replace("ö", "&#xF6;")
        + "</div>",
        "<div class='cookie-banner'>Wir verwenden Cookies. <a href='#'>Einverstanden</a></div>",
    ),
    words("Licht ohne Wärter", *ZEIT),
)
PAGES["Japanese, with `lang`"] = (
    article(
        "<meta charset=utf-8><title>駅の図書館</title>",
        "<nav><a href=/>ホーム</a> <a href=/news>お知らせ</a> <a href=/map>地図</a></nav>",
        f"<main lang='ja'><h1>駅の図書館</h1>{paragraphs(JA)}</main>",
        "<footer>著作権 図書館の会</footer>",
    ),
    words("駅の図書館", *JA),
)
PAGES["frames, with a text for those without"] = (
    "<html><head><title>Bees</title></head><frameset cols='20%,80%'><frame src='menu.htm'><frame src='main.htm'>"
    f"<noframes><body>{paragraphs(BEES)}</body></noframes></frameset></html>",
    words(*BEES),
)
PAGES["entity soup"] = (
    article(
        "<title>R&amp;D</title>",
        f"<nav>{menu('One', 'Two')}</nav>",
        "<article><h1>Caf&eacute; &amp; mill &#8212; a plan</h1><p>The caf&eacute; beside the mill costs "
        "&pound;40,000 "
        "&mdash; half of what Smith &amp; Sons asked for &hellip; &ldquo;It&rsquo;s a bargain&rdquo;, says the "
        "owner.</p><p>If x &lt; 3 and y &gt; 4, the pump starts; AT&T supplies the line &bogus; and nobody knows what "
        "&copy or &nbsp;&nbsp; were meant to be in the old plan, which somebody had copied by hand &#x263A;.</p>"
        f"<p>{MILL[2]}</p></article>",
        "<footer>&copy; 2026</footer>",
    ),
    words(
        "Café & mill — a plan",
        "The café beside the mill costs £40,000 — half of what Smith & Sons asked for … “It’s a bargain”, says "
        "the owner.",
        "If x < 3 and y > 4, the pump starts; AT&T supplies the line &bogus; and nobody knows what © or were "
        "meant to be in "
        "the old plan, which somebody had copied by hand ☺.",
        MILL[2],
    ),
)
PAGES["tags that are never closed"] = (
    "<title>Mill</title><body><div class=nav><a href=/>Home<a href=/x>News</div><div class=main><h1>The mill "
    "turns again<p>"
    + "<p>".join(f"<b>{text}" if number == 1 else text for number, text in enumerate(MILL))
    + "<div class=foot><small>webmaster at the valley",
    words("The mill turns again", *MILL),
)
PAGES["a script far larger than the text"] = (
    article(
        "<title>Bees</title><script>window.dataLayer=[];</script>",
        "<script>" + 'var s="<p>not a paragraph of the page</p>";if(a<b&&b>c){go("</div>")}\n' * 8000 + "</script>",
        f"<article><h1>How bees choose</h1>{paragraphs(BEES)}</article>",
        "<script type='application/json'>" + '{"title":"nothing to read here","n":1},' * 4000 + "</script>",
    ),
    words("How bees choose", *BEES),
)
PAGES["a question and its answers"] = (
    article(
        "<title>Why does cream split? - Kitchen Questions</title>",
        f"<div class='topbar'>{menu('Questions', 'Tags', 'Users', 'Log in')}</div>",
        "<div id='content'><h1>Why does cream split in a hot soup?</h1><div class='question'><p>I made my aunt's "
        "fish soup "
        "and the cream turned into small white grains as soon as it boiled. The taste was right but it looked "
        "terrible. What "
        "did I do wrong, and can it be rescued?</p></div><h2>2 Answers</h2><div class='answer'><p>Cream with "
        "little fat has "
        "much protein, and that sets when it boils, like an egg. Use cream with at least thirty percent of fat, "
        "add it at the "
        "end and keep the pot below the boil.</p></div><div class='answer'><p>A spoon of starch stirred into the "
        "cold cream "
        "helps as well. Split soup can be saved with a hand mixer, though it stays a little grainy.</p></div></div>",
        "<div id='sidebar'><h4>Linked</h4><a href='/1'>How to thicken a stew</a></div>",
    ),
    words(
        "Why does cream split in a hot soup?",
        "I made my aunt's fish soup and the cream turned into small white grains as soon as it boiled. The taste "
        "was right but "
        "it looked terrible. What did I do wrong, and can it be rescued?",
        "2 Answers",
        "Cream with little fat has much protein, and that sets when it boils, like an egg. Use cream with at "
        "least thirty "
        "percent of fat, add it at the end and keep the pot below the boil.",
        "A spoon of starch stirred into the cold cream helps as well. Split soup can be saved with a hand mixer, "
        "though it "
        "stays a little grainy.",
    ),
)
PAGES["a page of a shop"] = (
    article(
        "<title>Hand mill 'Gudrun'</title>",
        f"<nav>{menu('Mills', 'Grain', 'Basket (0)')}</nav><div class='breadcrumb'><a>Shop</a> &gt; "
        f"<a>Mills</a></div>",
        "<div class='product'><h1>Hand mill Gudrun</h1><div class='description'><p>A hand mill of beech with "
        "stones of "
        "granite, for two cups of grain at a time. The stones can be set from coarse meal to fine flour with the "
        "brass screw "
        "below the handle.</p><p>It is made in a workshop of five people in the valley, who also repair every "
        "mill that they "
        "have ever sold. Stones last about twenty years of daily use.</p></div></div>",
        "<form action='/basket'><select><option>1</option><option>2</option></select><button>Add to "
        "basket</button></form>"
        f"<div class='upsell'><h3>Others bought</h3>{TEASERS}</div><footer>Terms. Returns. Shipping.</footer>",
    ),
    words(
        "Hand mill Gudrun",
        "A hand mill of beech with stones of granite, for two cups of grain at a time. The stones can be set from "
        "coarse meal to "
        "fine flour with the brass screw below the handle.",
        "It is made in a workshop of five people in the valley, who also repair every mill that they have ever "
        "sold. Stones last "
        "about twenty years of daily use.",
    ),
)
PAGES["a short notice"] = (
    "<html><body><div id=nav><a href=/>Home</a></div><p>The office is closed on Friday.</p></body></html>",
    "The office is closed on Friday.",
)
