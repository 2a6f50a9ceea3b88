"""The words, sentences and plots of the demo stories.

`[a|b]` is a choice, `<name>` a rule of `RULES`, `{h}` the hero, `{f}` the friend, `{g}` the second friend, `{o}` the
object, `{p}` the place and `{there}` the same place once it is known. A line of a plot that starts with `+` needs the
second friend, one with `-` needs none.
"""

SHE = [
    "Ada", "Luna", "Mira", "Nora", "Pia", "Rosa", "Tilly", "Wilma", "Zoe", "Ida", "Juno", "Flora", "Hazel", "Ivy",
    "Clara", "Emmy", "Greta", "Lotte", "Olive", "Pearl", "Ruby", "Stella", "Wanda", "Dora",
]  # fmt: skip
HE = [
    "Bruno", "Oscar", "Otto", "Hugo", "Pablo", "Milo", "Felix", "Theo", "Basil", "Ralph", "Gus", "Linus", "Max",
    "Toby", "Emil", "Leo", "Anton", "Boris", "Casper", "Edgar", "Igor", "Jasper", "Konrad", "Nils",
]  # fmt: skip

FRIENDS = [
    "alpaca", "owl", "penguin", "cat", "robot", "old login node", "sleepy scheduler", "mouse", "fox", "hedgehog",
    "badger", "otter", "goat", "crow", "small switch", "shy router", "squirrel", "tortoise", "rabbit", "dog",
]  # fmt: skip
ANIMALS = [
    *FRIENDS,
    "llama", "bear", "bee", "beaver", "camel", "chicken", "cow", "crab", "crocodile", "deer", "dolphin", "donkey",
    "duck", "dragon", "eagle", "elephant", "ferret", "flamingo", "frog", "giraffe", "goose", "hamster", "hippo",
    "horse", "iguana", "kangaroo", "koala", "ladybird", "lion", "lizard", "lynx", "mole", "monkey", "moose",
    "octopus", "ostrich", "panda", "parrot", "peacock", "pelican", "pig", "pony", "rat", "raven", "seal", "sheep",
    "sloth", "snail", "sparrow", "spider", "stork", "swan", "tiger", "toad", "turtle", "unicorn", "walrus", "whale",
    "wolf", "wombat", "yak", "zebra", "wizard", "princess", "pirate", "ghost", "knight", "baker", "programmer",
    "professor", "student", "astronaut",
]  # fmt: skip

LOOKS = {
    "llama": ["soft white wool", "long soft ears", "soft brown wool"],
    "alpaca": ["fluffy wool"],
    "owl": ["big round eyes"],
    "cat": ["long whiskers"],
    "penguin": ["a shiny black coat"],
    "robot": ["a small blue light"],
}
ANY_LOOK = ["a kind smile", "a warm voice", "bright eyes", "a little red scarf", "a tiny green hat"]

OBJECTS = [
    "golden node", "lost packet", "warm blanket", "broken cable", "old checkpoint", "silver key", "tiny lamp",
    "magic punch card", "red button", "map of the network", "spare battery", "blue bell", "torn manual", "music box",
    "paper boat", "wooden flute", "glass marble", "secret password", "green kite", "shiny connector", "empty box",
    "dusty tape", "round cheese", "orange umbrella", "singing teapot", "little clock", "spare screw", "big red book",
    "yellow scarf", "missing file",
]  # fmt: skip
ADJECTIVES = [
    "old", "new", "tiny", "big", "red", "blue", "green", "golden", "silver", "broken", "lost", "magic", "shiny",
    "round", "heavy", "purple", "wooden", "strange", "soft", "yellow", "rusty", "secret", "warm", "cold", "forgotten",
    "pink", "orange", "black", "white", "glowing",
]  # fmt: skip
NOUNS = [
    "apple", "bag", "ball", "balloon", "banana", "basket", "bicycle", "boat", "book", "boot", "bottle", "bowl", "box",
    "bucket", "button", "cable", "cake", "candle", "carrot", "chair", "chip", "clock", "coin", "comet", "computer",
    "cookie", "crown", "cup", "diamond", "disk", "drum", "egg", "feather", "flag", "flower", "fork", "guitar",
    "hammer", "hat", "helmet", "jar", "kettle", "key", "keyboard", "ladder", "lamp", "laptop", "leaf", "lemon",
    "letter", "lock", "magnet", "map", "mirror", "mug", "mushroom", "necklace", "needle", "node", "notebook",
    "orange", "packet", "pancake", "parachute", "pencil", "piano", "pillow", "pizza", "plate", "potato", "processor",
    "pumpkin", "puzzle", "ring", "robe", "rocket", "rope", "sandwich", "screwdriver", "shell", "shoe", "shovel",
    "snowball", "sock", "spoon", "star", "stone", "sword", "telescope", "tent", "ticket", "treasure", "trumpet",
    "umbrella", "vase", "violin", "wagon", "watch", "wheel", "whistle",
]  # fmt: skip

PLACES = [
    "on the cluster", "in the machine room", "on the mountain", "in the tape archive", "in the forest of cables",
    "in the valley of the switches", "on the island of fast memory", "next to the cooling tower", "behind the firewall",
    "at the edge of the network", "in the library of files", "under the raised floor", "on the seventh rack",
    "near the supercomputer",
]  # fmt: skip
MORE_PLACES = [
    "in a small village", "in the desert", "by the sea", "in a castle", "on the moon", "in the forest", "on a farm",
    "in the city", "on an island", "at the university", "in the kitchen", "in the garden", "on a ship", "in the office",
    "in the snow", "in a cave", "at school", "on a cloud", "in the jungle", "on a train", "at the data centre",
]  # fmt: skip

TRAITS = [
    "curious", "patient", "careful", "cheerful", "polite", "helpful", "thoughtful", "modest", "hopeful", "playful",
]  # fmt: skip
LIKINGS = [
    "mint tea", "oat cookies", "hot soup", "fresh bread", "apple cake", "warm milk", "honey toast", "pancakes",
    "plum jam", "roasted chestnuts",
]  # fmt: skip
SPOTS = [
    "behind the last rack", "under a loose floor tile", "inside an old tape box", "between two switches",
    "on top of the tallest rack", "in a drawer full of screws", "behind the biggest fan", "under a heap of old cables",
    "in the pocket of an old coat", "next to the coffee machine", "behind a dusty monitor", "below the stairs",
]  # fmt: skip
NUMBERS = ["forty-two", "ninety-nine", "one hundred and seven", "three hundred and twelve", "one thousand and one"]
RANKS = ["eight", "sixteen", "thirty-two", "sixty-four"]
RANK = ["one", "two", "three", "four", "five", "six", "seven"]
SHARES = {
    2: [("six", "three"), ("eight", "four"), ("ten", "five"), ("twelve", "six"), ("twenty", "ten")],
    3: [("six", "two"), ("nine", "three"), ("twelve", "four"), ("fifteen", "five"), ("thirty", "ten")],
}
SOUNDS = ["Clack", "Pling", "Bong", "Ratatat", "Plop"]
COUNTED = ["stars above the roof", "holes in the floor tiles", "blinking lights", "raindrops on the window"]

RULES = {
    "opening": [
        "Once upon a time, there was {h.a} [called|named] {h} who lived {p}.",
        "Once upon a time, there was {h.a} [called|named] {h} who lived {p}.",
        "Once upon a time, {h.a} [called|named] {h} lived {p}.",
        "Once upon a time, {h.a} [called|named] {h} lived {p}.",
        "Once upon a time, {p}, there lived {h.a} [called|named] {h}.",
        "Long ago, {h.a} [called|named] {h} lived {p}.",
        "Not so long ago, there was {h.a} [called|named] {h} who lived {p}.",
        "There once was {h.a} [called|named] {h} who lived {p}.",
        "The {h.kind} who lived {p} was called {h}.",
        "{h} the {h.kind} lived {p}.",
        "{h} was {h.a} who lived {p}.",
        "Far away, {p}, there lived {h.a} [called|named] {h}.",
        "This is the story of {h.a} [called|named] {h}, who lived {p}.",
    ],
    "trait": [
        "{h.he} was {trait} and loved {liking}.",
        "{h.he} was {trait} and loved {liking}.",
        "{h.he} was very {trait}, and {h.he} loved {liking}.",
        "Everyone knew that {h} was {trait} and that {h.he} loved {liking}.",
        "{h.he} was the most {trait} {h.kind} for many racks around, and nothing made {h.him} happier than {liking}.",
        "{h} had {look}, loved {liking}, and was always {trait}.",
        "{h.he} had {look}. {h.he} was {trait}, and {h.his} favourite [treat|thing in the world] was {liking}.",
    ],
    "day": ["one morning", "one day", "one rainy evening", "one windy afternoon", "on a quiet Sunday", "one Monday"],
    "oh": ["oh no", "oh dear", "goodness me"],
    "said": ["said", "said", "said", "answered", "replied"],
    "thanks": [
        '"Thank you, {all}," said {h}.',
        '"I could not have done it without you, {all}," said {h}.',
        '"Thank you, {all}!" said {h}, and {h.he} meant it.',
        '"You are a true friend, {f}," said {h}. "What would I do without you?"',
        "",
        "",
        "",
        "",
    ],
    "feast": [
        "That evening, they shared {liking} and [told jokes about slow networks|listened to the hum of the fans].",
        "In the evening, {h} brought {liking} for everyone, and they [sang|laughed] until the lights"
        " [went out|blinked].",
        "Then they sat down together, enjoyed {liking} and watched the [green|little] lights blink.",
        "They celebrated with {liking}, and even the fans [hummed a merry tune|purred].",
        "",
        "",
    ],
    "closing": [
        "From that day on, {h} and {f} were the best of friends.",
        "From that day on, {h} and {f} were never more than one hop apart.",
        "And if the wall limit has not been reached, they are laughing still.",
        "And if the wall limit has not been reached, they are dancing still.",
        "And {h} was the happiest {h.kind} of all.",
        "And so the most {trait} {h.kind} went to sleep with a smile.",
        "And {o.the}? It still has a place of honour {there}.",
        "And whenever {h} saw {o.the}, {h.he} thought of {f} and smiled.",
        "",
        "",
        "",
    ],
}

# Each plot: what one may ask for to get it, and its text.
PLOTS = {
    "lost": (
        ["searching in parallel", "something lost", "a search"],
        """
<opening> <trait>

<day>, {h} wanted to [look at|polish] {h.his} [dearest treasure|favourite thing], {o.a}. But {o.the} was [gone|not
there]! "<oh>," said {h}. "[Where is my {o.kind}?|Who has seen my {o.kind}?]"

{h} looked {spot2}. Then {h.he} looked {spot3}. [There was nothing but dust.|{h.he} found only a lost sock.|{h.he}
found three dead batteries, but no treasure.] On the way back {h.he} met {f.new}. "[Let me help you|I will help
you]," <said> {f}. "[Two can search faster than one.|You take the even racks, and I take the odd ones.|We can search
in parallel.]"

+They also asked {g.new}. "[Things hide where nobody looks twice|Think of the place you clean least]," said {g}.
+"Have you looked {spot}?" They ran as fast as they could, and there, {spot}, was {o.the}!
-They searched all day, side by side. At last {f} looked {spot}, and there was {o.the}, [a bit dusty but whole|safe
-and sound]!

<thanks> <feast> [Four eyes see more than two, and so do two ranks.|A search is half as long when it is shared.]
<closing>
""",
    ),
    "queue": (
        ["waiting in a queue", "the queue", "patience", "a long queue", "a batch job"],
        """
<opening> <trait>

<day>, {h} wanted to [show|bring] {o.a} to the biggest computer in the world. But in front of the computer there was
a queue, and the queue was very long. {h} took a ticket. It was number {number}.

In the queue {h.he} met {f.new}. "How long have you been waiting?" asked {h}. "[Only since Tuesday|Three days and a
half|Since I was young]," <said> {f}. "They say that it will be our turn soon. They say so every morning."

{h} wanted to [run past everybody|push to the front]. "Please do not," said {f}. "[Let us make our job small. Small
jobs slip through the gaps.|Ask for ten minutes instead of ten days. Short jobs fit anywhere.]" So they packed
{o.the} into a very small job and waited [politely|without a sigh].

+Soon {g.new} came along with a long list. "I have a little gap here," said {g}. "Does anybody have a small job?"
-Soon a voice called, "I have a little gap here! Does anybody have a small job?"
"We do!" cried {h} and {f}. And so number {number} was [next|called], long before supper, and the big computer liked
{o.the} very much.

<thanks> <feast> [Who asks for little gets it soon.|Patience is good, and a short wall time is better.] <closing>
""",
    ),
    "rank": (
        ["a missing rank", "a barrier", "MPI", "the missing rank", "ranks"],
        """
<opening> <trait>

<day>, {ranks} ranks came together {there} to [solve a great puzzle|start a great calculation|sing a song in {ranks}
voices]. They met at the barrier and counted. But rank {rank} was missing! "Nobody may pass the barrier until
everybody is here," [they sighed|they said]. So they all waited, and waiting is hard work.

{h} could not bear it. {h.he} asked {f.new} for help. "[Ranks are never lost|Nobody is ever lost]," <said> {f}.
"They are only late. Let us look [together|for footprints]." They looked {spot2}, but there was nobody.
+Then they met {g.new}. "I heard somebody laugh {spot}," said {g}.

There, {spot}, sat rank {rank} and played with {o.a}. "I am so sorry," said rank {rank}. "[I did not know that
anybody was waiting for me.|I forgot the time, because it is so pretty.]" "[We always wait for you|Without you we
cannot begin]," said {h} kindly. "Bring {o.the} along!"

When they came back, {ranks} voices cheered, and all of them passed the barrier together. <thanks> <feast> [A
barrier is only a place where friends wait for each other.|Everybody counts, and rank {rank} counts as much as rank
zero.] <closing>
""",
    ),
    "ring": (
        ["an allreduce", "a ring", "holding hands", "a sum", "working together"],
        """
<opening> <trait>

<day>, a merchant came by with {o.a}. It cost {number} [coins|acorns|shells], and nobody had so many. "[Perhaps all
of us together have enough|Let us put our savings together]," said {h}. So everybody shouted a number at {h}, all at
the same time, until {h.his} head was spinning. "<oh>," said {h}. "I am only one, and you are many!"

+Then {f.new} and {g.new} had an idea.
-Then {f.new} had an idea.
"[Let us stand in a ring and hold hands|Let us all make a big ring]," said {f}. "Everybody tells the sum only to the
neighbour on the right." So they did. The sum went round the ring, and it grew at every step. [After the second
round, everybody knew it.|When it had gone round twice, all of them knew the answer.]

"It is {number}!" they all cried at once. It was just enough. The merchant [smiled|laughed] and gave them {o.the}.
"What do you call this trick?" asked the merchant. "An allreduce," <said> {f}. "It is [arithmetic with holding
hands|a dance in which you learn something]."

<thanks> <feast> [Nobody has to know everything first, if all of them know it in the end.|In a ring, nobody is the
last.] <closing>
""",
    ),
    "checkpoint": (
        ["a checkpoint", "a power cut", "saving your work", "starting again"],
        """
<opening> <trait>

<day>, {h} [read|heard] that there was a prize for the first one to count all the {counted}. The prize was {o.a}. So
{h} sat down and began to count. "One, two, three," said {h}, and {h.he} did not stop for lunch.

{f.A} called {f} came by. "[Write the number down from time to time|Do not forget to make a checkpoint]," said {f}.
"[You never know what will happen.|The wall limit comes when you expect it least.]" {h} did not like to stop, but
{h.he} wrote the number on a piece of paper and hid it {spot}.

Then, all of a sudden, [there was thunder and all the lights went out|the power failed and it was dark|a loud bell
rang, because the wall limit was reached]. {h} was so startled that {h.he} forgot the number. "<oh>!" cried {h}.
"Now I must start again from one!" "No," said {f}. "You have a checkpoint, remember?"
+Luckily {g.new} had a lamp, and {g} [held it high|shone it into every corner].
They found the paper {spot}, and on it stood the number {number}. So {h} went on from there and was done by supper.

{h} won {o.the}. <thanks> <feast> [Who writes checkpoints sleeps well.|A small checkpoint is worth more than a big
memory.] <closing>
""",
    ),
    "winter": (
        ["a cold winter", "the cold", "waste heat", "the snow", "keeping warm"],
        """
<opening> <trait>

One winter it was so cold {there} that [even the status lights shivered|the messages froze in the cables]. {h} had
only {o.a}, and {h.he} held it tight. At the door sat {f.new}, who was shaking. "[I am so cold|I cannot feel my
toes]," said {f}. "May I come in?" "Of course," said {h}. "[What is mine is yours.|There is room for two.]"

But two friends and {o.a} were still not warm enough.
+So they asked {g.new}, who knew everything about heat. "Go where the work is," said {g}. "A busy node is always
+warm."
-Then {h} had an idea. "A busy node is always warm," said {h}. "Let us find some work!"
So they started the biggest job they knew, one with {ranks} ranks, and sat down behind the fans. [Warm air blew
around their noses.|Soon it was as warm as in May.] {o.The} [began to shine in the warm air|was warm as well], and
{f} stopped shaking.

"[People call it waste heat|Some call it waste]," said {f}, "but I call it [a blanket that you cannot see|summer]."
Others came from the cold as well, and nobody was sent away. <feast> [Warmth is the one thing that grows when you
share it.|Good work warms more than one.] <closing>
""",
    ),
    "login": (
        ["the login node", "a tired computer", "a busy login node", "a login node"],
        """
<opening> <trait>

Everybody loved the big front door, and so everybody worked right there, where one comes in. They sorted, they
counted and they compiled, and nobody could get through any more. <day>, the door [groaned|sighed] so loudly that
{h} dropped {o.a}. "[I am so tired|I cannot carry you all]," said the door. "I am only here to say hello!"

"<oh>," said {h}. "We must do something." {h.he} asked {f.new}, who was just [compiling something large|sorting a
very long list] in the doorway. {f} turned red. "[I did not know that it hurts|I only wanted to be quick]," <said>
{f}. "There are {ranks} empty rooms inside. Let us all go there!"

+{g.A} called {g} painted a sign, and {h} hung it up above the bell.
-They painted a sign, and {h} hung it up above the bell.
On it stood: "Say hello here, and work inside." Soon the doorway was [quiet|empty], and every room was busy. To say
sorry, they gave {o.the} to the door, and the door [hummed with joy|had never been so happy].

<thanks> <feast> [A good guest does not stay in the doorway.|There is a place for work, and a place for hello.]
<closing>
""",
    ),
    "shy": (
        ["a shy node", "a new node", "an empty message", "being shy", "friendship"],
        """
<opening> <trait>

<day>, a new node arrived {there}. It was so shy that it sent only empty messages. "[It does not like us|There is
nothing in them]," said the others, and they stopped listening. But {h} did not. "[An empty message also says
something|Zero bytes can say a lot]," said {h}. "It says: I am here."

{h} talked about it with {f.new}. "[Let us bring a present|A present may help]," <said> {f}. They searched for a
long time, and {spot} they found {o.a}. It was just right.
+{g.A} called {g} tied a ribbon around it.
They put {o.the} in front of the new node and [waited|tiptoed away].

The next day a message came, and it was one byte long. "[Look|Listen]!" cried {f}. "It is a small one, but it is not
empty!" The day after there were two bytes, and then four, and then eight. After {number} messages the node spoke in
whole sentences. "Thank you for {o.the}," it said. "And thank you for [waiting|listening]."

<feast> [Some friends only have a long latency.|Who listens to small messages will get big ones.] <closing>
""",
    ),
    "cable": (
        ["a broken cable", "a slow network", "a message", "a long way", "bandwidth and latency"],
        """
<opening> <trait>

Behind the hills lived {h.his} friend {f}, {f.a}. They sent each other messages every day. But <day>, the cable
between them [broke|was cut by a spade], and it was the very day on which {f} needed {o.a}. "<oh>," said {h}. "[No
cable, no packets.|How can I send it now?]"

"Then I will carry it myself," said {h}. {h.he} packed {o.the} and set out. {h.he} walked [over the hills|through
the wind], and {h.he} did not drop a single packet.
+At the river {h.he} met {g.new}. "I know a shorter route," said {g}, and showed {h.him} the way.
-At the river there was no bridge, so {h.he} waited for low traffic and jumped.

After [two|three|four] days {h} knocked at the door. "[Here I am|Delivery]!" said {h}. "My bandwidth is excellent,
but my latency is not." {f} laughed [with joy|for a long time]. "You are the best network I know," said {f}, and
{f.he} put {o.the} {spot}, where it was safe. The next morning they mended the cable together.

<feast> [A message is worth most when a friend brings it.|Never laugh at the bandwidth of a friend with a bag.]
<closing>
""",
    ),
    "files": (
        ["too many small files", "a file system", "the library", "a parallel file system", "small files"],
        """
<opening> <trait>

In the great library of files worked {f.new}. <day>, {h} came to borrow {o.a}, but {f} sat on the floor and looked
very tired. "Everybody brings me tiny notes," said {f}. "Today there were {number}, and on each of them stands [only
one word|a single number]! I cannot find anything any more, not even {o.the}."

"[That is easy to mend|Let me help]," said {h}. "[Let us bind all the tiny notes into one big book.|One big book is
better than a thousand notes.]"
+{g.A} called {g} brought glue, and {g} read the notes aloud.
They sorted and glued, and everybody wrote on a page of their own at the same time, so that nobody had to wait.

When the last note was gone, they could see the floor again. And there, {spot}, was {o.the}! "You may keep it," said
{f}. "[You have given me back my library.|I have not seen this floor for years.]"

<thanks> <feast> [One big file makes a happy library.|Many small things become light when you bind them together.]
<closing>
""",
    ),
    "bridge": (
        ["a deadlock", "a bridge", "being too polite", "waiting for each other"],
        """
<opening> <trait>

<day>, {h} carried {o.a} over a narrow bridge. From the other side came {f.new}. In the middle they stopped. "After
you," said {h}. "No, after you," said {f}. "[I can wait|I insist]," said {h}. "So can I," said {f}. And so they both
waited, and neither of them moved.

[The sun went down|The moon rose|It began to rain], and they were still waiting. "I think this is a deadlock," said
{h} at last. "[I think so too|I was afraid of that]," <said> {f}. "But I do not want to be rude."
+{g.A} called {g} saw them from the bank. "You can send and receive at the same time!" called {g}. "Each of you takes
+a step to the right!"
-Then {h} had an idea. "We can send and receive at the same time!" said {h}. "Each of us takes a step to the right!"
They counted to three and took a step to the right. It worked at once, and {o.the} did not even [wobble|get wet].

They laughed so much that the bridge shook. <thanks> <feast> [It is good to be polite, but somebody has to go
first.|When everybody waits, nobody arrives.] <closing>
""",
    ),
    "share": (
        ["sharing the work", "load balance", "teamwork", "too much work", "heavy boxes"],
        """
<opening> <trait>

<day>, {h} was looking for {o.a}. {h.he} knew that it lay {there}, but {total} heavy boxes of data were standing on
top of it. {h} began to carry them away, one after the other. [It was hot, and {h.he} was soon out of breath.|It was
slow, and {h.his} back began to ache.]

+Next to the boxes sat {f.new} and {g.new}, and they were idle. "[Why does nobody help me|Are you busy]?" asked {h}.
+"You did not ask," said {f}. "Three of us and {total} boxes," said {g}, "that makes {each} boxes for each of us."
-Next to the boxes sat {f.new}, and {f.he} was idle. "[Why does nobody help me|Are you busy]?" asked {h}. "You did
-not ask," said {f}. "Two of us and {total} boxes, that makes {each} boxes for each of us."
So they put the boxes back and started again, and everybody carried {each}. [They were done at the same time, and
nobody had to wait.|It went so fast that the dust had no time to settle.]

Under the last box lay {o.the}. "[How pretty it is|There it is at last]!" said {h}. <feast> [Work that is
well shared is half done.|No rank should be tired while another one sleeps.] <closing>
""",
    ),
    "noise": (
        ["a strange noise", "a ghost", "the night", "a noise in the night", "being brave"],
        """
<opening> <trait>

[One night|Late one night|On a dark night], when everybody was asleep, there was a noise. "{sound}! {sound}!" {h}
sat up in bed. "[Is it a ghost|Is it a bug]?" {h.he} whispered. {h.he} was a little afraid, so {h.he} woke {f.new}.
"[I will come with you|We will look at it together]," said {f}. "[A bug is only scary when you are alone with
it.|Most ghosts have a log file.]"

They took a lamp and followed the noise. "{sound}! {sound}!" it went, louder and louder.
+On the way they met {g.new}, who could not sleep either. "It comes from over there," whispered {g}.
They looked {spot2}, but nothing moved. Then they looked {spot}. And there was no ghost at all. There was {o.a}, and
it was stuck in a fan! At every turn the fan hit {o.the} and went "{sound}!"

{h} switched the fan off and {f} pulled {o.the} out. [Then it was so quiet that they could hear the dust.|How quiet
it was now!] <thanks> <feast> [Look at the problem closely, and it becomes small.|Fear is a bug that you can fix
with a friend.] <closing>
""",
    ),
    "gift": (
        ["a birthday", "a present", "a gift", "a surprise"],
        """
<opening> <trait>

{h} had a good friend, {f.a} called {f}. <day>, {h} looked at the calendar. "<oh>!" said {h}. "Tomorrow is the
birthday of {f}, and I have no present!"

+{h.he} ran to {g.new} and asked for advice. "{f} has always wished for {o.a}," said {g}. "But they are hard to
+find."
-Then {h.he} remembered that {f} had always wished for {o.a}.
{h} looked {spot2}. {h.he} looked {spot3}. [{h.he} asked everybody, even the printer.|{h.he} read all the log
files.] When it was almost dark, {h.he} looked {spot}. There it was, {o.a}, [as pretty as in a dream|just the right
size]!

The next morning {h} knocked at the door. "Happy birthday, {f}!" said {h}. {f} opened the parcel and [could not say
a word|was silent for a whole second, which is a very long time for a computer]. "{o.A}!" {f.he} cried. "How did you
know?" "[Friends share memory|A good friend prefetches]," said {h} and smiled.

<feast> [The best present is that somebody thought of you.|A wish that is remembered is half granted.] <closing>
""",
    ),
    "race": (
        ["a race", "being fast", "a competition", "speed"],
        """
<opening> <trait>

{there} there also lived {f.new}, who was very fast. "I am the fastest of all," said {f} every day. <day>, {f} said
to {h}, "[Let us have a race|Let us see who is faster]! The winner gets {o.a}." {h} was not fast, but {h.he} liked
to run, so {h.he} said yes.

They started at noon. {f} was off [like a packet|like the wind]. {h} ran at {h.his} own pace.
+Half way there sat {g.new} with a hurt foot. {f} had run past, but {h} stopped and helped {g} to get up.
-Half way there lay a cable that had come loose. {f} had jumped over it, but {h} stopped and plugged it in.
"[It takes only a minute|That is more important than a race]," said {h}.

{f} was at the finish first, but {f.he} had lost half of {f.his} luggage on the way and had to [go back for it|send
it all again]. And so {h} won after all. "[Fast is not the same as done|Peak speed is not everything]," said {f},
and {f.he} had to laugh. {h} looked at {o.the}. "Let us share it," {h.he} said. "You on the odd days, and I on the
even ones."

<feast> [Who stops to help arrives at the right time.|Peak speed is for posters, and friends are for every day.]
<closing>
""",
    ),
}
