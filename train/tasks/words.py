"""Word lists of the generators: plain English words and common proper nouns, grouped by what they name."""

from __future__ import annotations


def split_words(text: str) -> tuple[str, ...]:
    """Split a list written one entry after another; `_` stands for a blank inside an entry."""
    return tuple(word.replace("_", " ") for word in text.split())


FIRST_NAMES = split_words("""
    Aaron Abigail Adam Adele Agnes Aisha Alan Albert Alex Alice Amanda Amir Amy Ana Andre Andrew Angela Anita Anna
    Anton Arthur Astrid Barbara Beatrice Ben Bianca Boris Brenda Brian Bruno Camila Carl Carmen Caroline Cecilia
    Chen Chloe Clara Claude Colin Dana Daniel Daphne David Deborah Dennis Diana Diego Dmitri Dora Edgar Edith
    Eduardo Elena Elias Elisa Emil Emma Eric Esther Eva Fatima Felix Fiona Frank Frida Gabriel George Gina Gloria
    Grace Greta Hana Harold Hassan Hector Helen Henry Hugo Ian Ibrahim Ida Ines Ingrid Irene Isaac Ivan Jack James
    Jane Jasmine Jason Jean Jenny Joel John Jonas Jorge Joyce Julia Karen Karim Kate Keiko Kevin Kira Lars Laura Leo
    Lena Liam Linda Louis Lucia Luis Lydia Magnus Marco Margaret Maria Mark Marta Martin Mason Max Maya Megan Mei
    Michael Miguel Mila Mira Mohamed Monica Nadia Nathan Nina Noah Nora Olaf Olga Oliver Omar Oscar Pablo Patricia
    Paul Pedro Peter Petra Philip Priya Quentin Rachel Ralph Raj Rebecca Robert Rosa Ruth Samir Samuel Sandra Sara
    Sean Sofia Stella Stefan Susan Tara Teresa Thomas Tim Tom Uma Vera Victor Viola Walter Wendy William Yara Yuki
    Yusuf Zoe
""")
SURNAMES = split_words("""
    Abbott Adler Ahmed Allen Alvarez Andersen Archer Baker Barnes Becker Bell Bennett Berg Bishop Black Blake Bond
    Brandt Brooks Brown Burke Butler Calder Carter Castro Chandra Chavez Clark Cole Collins Cooper Costa Cruz Dalton
    Davies Delgado Diaz Dixon Doyle Drake Duarte Duncan Eaton Edwards Ellis Erikson Evans Farrell Fischer Fletcher
    Flores Foster Fox Franco Fuchs Garcia Gibson Gomez Grant Gray Green Griffin Gupta Haas Hall Hansen Harper Hayes
    Hill Hoffman Holmes Hughes Hunt Ibarra Ito Jackson Jansen Jensen Jones Kang Kaplan Kaur Keller Kelly Khan Kim
    King Klein Kowalski Kumar Lang Larsen Lee Lewis Lin Lopez Lund Marsh Martinez Mason Mendez Meyer Miller Mills
    Morales Moreau Morgan Moss Muller Murphy Nash Nguyen Nolan Novak Ochoa Olsen Ortiz Owens Park Patel Perez Perry
    Petrov Pierce Porter Quinn Ramos Reed Reyes Rhodes Rivera Rossi Rowe Russo Sato Schmidt Shah Sharp Silva Singh
    Smith Soto Stone Suzuki Tanaka Taylor Torres Turner Vargas Vega Vogel Wagner Walsh Wang Ward Watson Weber Wells
    West White Wilson Wolf Wood Wright Yang Young Zhang Ziegler
""")
CITIES = split_words("""
    Accra Adelaide Amsterdam Ankara Athens Atlanta Auckland Austin Baltimore Bangkok Barcelona Basel Beirut Belfast
    Bergen Berlin Bilbao Bogota Bologna Boston Bristol Brussels Bucharest Budapest Cairo Calgary Cardiff Chicago
    Cologne Copenhagen Cork Dakar Dallas Denver Detroit Dresden Dublin Durban Edinburgh Florence Frankfurt Geneva
    Genoa Ghent Glasgow Hamburg Hanoi Havana Helsinki Houston Istanbul Jakarta Kampala Karachi Krakow Kyoto Lagos
    Leeds Leipzig Lima Lisbon Liverpool London Lyon Madrid Malmo Manchester Manila Marseille Melbourne Miami Milan
    Minsk Montreal Moscow Mumbai Munich Nairobi Naples Nashville Odessa Orlando Osaka Oslo Ottawa Oxford Palermo
    Paris Perth Phoenix Porto Portland Prague Quito Reykjavik Riga Rome Rotterdam Salzburg Santiago Sarajevo Seattle
    Seoul Seville Shanghai Sofia Stockholm Stuttgart Sydney Tallinn Tampa Tbilisi Tokyo Toronto Trieste Tunis Turin
    Utrecht Valencia Vancouver Venice Vienna Vilnius Warsaw Zagreb Zurich
""")
PROFESSIONS = split_words("""
    accountant actor architect astronomer baker banker barber biologist bookseller builder butcher carpenter chemist
    coach composer cook dancer dentist designer detective diver doctor driver editor electrician engineer farmer
    firefighter fisherman florist gardener geologist glazier historian jeweller journalist judge lawyer librarian
    locksmith mason mechanic midwife miner musician nurse optician painter pharmacist photographer pilot plumber
    poet potter printer programmer psychologist ranger reporter sailor sculptor secretary singer soldier surgeon
    tailor teacher translator vet waiter weaver welder writer
""")
FOODS = split_words("""
    almonds apples apricots bacon bananas beans beetroot biscuits blueberries bread broccoli burgers butter cake
    carrots cashews cheese cherries chestnuts chicken chocolate coconut cookies corn couscous crackers cucumber
    curry dates dumplings eggs falafel figs fish garlic ginger grapes ham honey hummus jam kale kebab lamb lasagna
    leeks lemons lentils lobster mangoes melon mushrooms mustard noodles nuts olives onions oranges oysters pancakes
    pasta peaches peanuts pears peas pepper pickles pie pineapple pizza plums popcorn potatoes prawns pretzels
    pudding pumpkin radish raisins ramen rice salad salmon sausages scones shrimp soup spinach squash steak stew
    strawberries sushi tacos tofu tomatoes trout tuna turkey waffles walnuts yoghurt
""")
ANIMALS = split_words("""
    alpaca badger beagle budgie camel canary cat chameleon chicken cobra cockatoo collie corgi cow dalmatian donkey
    dove duck eel falcon ferret finch frog gecko gerbil goat goldfish goose greyhound hamster hawk hedgehog horse
    husky iguana kitten lamb lizard llama lobster macaw mouse mule newt otter owl ox parrot peacock pig pigeon pony
    poodle puppy python rabbit rat raven rooster salamander sheep snail snake spaniel sparrow spider swan terrier
    toad tortoise turtle weasel
""")
INSTRUMENTS = split_words("""
    accordion banjo bassoon bugle cello clarinet cornet drums fiddle flute guitar harmonica harp harpsichord horn
    lute lyre mandolin marimba oboe organ piano piccolo recorder saxophone sitar tambourine triangle trombone
    trumpet tuba ukulele viola violin xylophone zither
""")
LANGUAGES = split_words("""
    Arabic Basque Bengali Bulgarian Catalan Croatian Czech Danish Dutch English Estonian Finnish French Georgian
    German Greek Hebrew Hindi Hungarian Icelandic Irish Italian Japanese Korean Latin Latvian Malay Norwegian
    Persian Polish Portuguese Romanian Russian Serbian Slovak Spanish Swahili Swedish Tamil Thai Turkish Urdu
    Vietnamese Welsh
""")
SUBJECTS = split_words("""
    algebra anatomy anthropology archaeology architecture art astronomy biology botany calculus chemistry computing
    dance drama ecology economics education engineering ethics finance genetics geography geology geometry grammar
    history journalism law linguistics literature logic marketing mathematics medicine music nursing nutrition
    philosophy physics poetry politics psychology robotics sociology statistics theology zoology
""")
SPORTS = split_words("""
    archery badminton baseball basketball biathlon bowling boxing chess climbing cricket croquet curling cycling
    darts diving fencing football golf gymnastics handball hockey judo karate kayaking lacrosse polo rowing rugby
    running sailing skating skiing snooker softball squash surfing swimming tennis volleyball wrestling yoga
""")
HOBBIES = split_words("""
    baking birdwatching blogging brewing camping carving collecting cooking crochet dancing drawing embroidery
    fishing foraging gardening genealogy hiking juggling knitting magic origami painting photography pottery puzzles
    quilting reading sculpture sewing singing sketching skydiving stargazing travel weaving whittling woodwork
    writing
""")
COLOURS = split_words("""
    amber beige black blue bronze brown copper crimson cyan gold green grey indigo ivory lilac magenta maroon navy
    olive orange pink purple red scarlet silver tan teal turquoise violet white yellow
""")
VEHICLES = split_words("""
    bicycle bus camper canoe car coupe ferry hatchback jeep lorry minibus moped motorbike pickup scooter sedan sled
    tractor trailer tram truck van wagon yacht
""")
MONTHS = split_words("January February March April May June July August September October November December")
WEEKDAYS = split_words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
PRODUCTS = split_words("""
    batteries bicycles blankets boats boots bottles bricks bulbs cables cameras candles carpets cars chairs clocks
    coats computers cranes curtains desks doors drills drones engines fans fridges furniture gears glasses gloves
    guitars hats headphones heaters helmets hinges jackets kettles keyboards knives ladders lamps lasers lenses
    locks magnets mattresses mirrors motors nails ovens paint paper pens phones pianos pipes planes plates printers
    pumps radios robots ropes routers saddles satellites scarves screens sensors shelves ships shirts shoes skis
    soap sofas speakers sweaters tablets tents tiles tools toys trains trucks tyres umbrellas wallets watches wheels
    windows
""")
COMPANY_STEMS = split_words("""
    Acorn Alpine Anchor Apex Arbor Aspen Atlas Aurora Beacon Birch Bluebird Boulder Bridge Canyon Cascade Cedar
    Citadel Cobalt Comet Condor Copper Coral Crescent Crown Crystal Delta Eagle Ember Falcon Fern Flint Forge
    Frontier Galaxy Garnet Glacier Granite Harbor Harvest Hazel Heron Horizon Ivory Jasper Juniper Keystone Lantern
    Laurel Liberty Lotus Lunar Maple Marble Meadow Meridian Mosaic Nimbus Northern Oak Oasis Onyx Opal Orbit Orchid
    Osprey Pacific Palm Pearl Pine Pioneer Polar Prairie Quartz Raven Redwood River Robin Sable Saffron Sequoia
    Sierra Silver Solar Spruce Sterling Summit Sunrise Swift Temple Tiger Topaz Trident Tulip Union Valley Velvet
    Vista Willow Zenith Zephyr
""")
COMPANY_KINDS = split_words("""
    Airlines Bank Brothers Capital Chemicals Electric Energy Foods Group Holdings Industries Insurance Labs
    Logistics Media Mining Motors Partners Pharma Power Rail Retail Shipping Software Steel Systems Telecom Textiles
    Trading Works
""")
SYLLABLES_HEAD = split_words("""
    Bal Bren Cal Cor Dal Del Dor Fal Fen Gal Gor Hal Hes Jor Kal Kel Lor Mar Mel Mor Nal Nor Pel Per Quil Ral Rin
    Sel Sil Tal Tor Val Vel Wen Xan Yel Zan Zor
""")
SYLLABLES_TAIL = split_words("""
    ba bek da dan den do fin ga go gren ka kin la lan lek lin lo ma men mir mo na nek no ra ran ren rik ro sa sen so
    ta tan ten tha to va ven vik vo wyn za zen
""")
TOPICS = split_words("""
    books films football cooking music painting travel history space robots gardens trains board_games old_cars
    birds mountains the_sea poetry chess coffee tea bread cheese languages maps photography running swimming dancing
    science
""")
