//! Questions with known answers, made by a seeded generator: sums, choices of four, small objects in JSON. Only what models
//! say to them is data.
//!
//! They are easy, so that a model of 135 million parameters is right about half of the time: a gate has nothing to do
//! where the model is always right, or always wrong. Examples of the wanted form stand before each question, as turns of
//! the conversation.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    domain::{ContentPart, Hash, Message, Role, Signals},
    fit,
    replay::metrics::SplitMix,
};

/// Kinds of questions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Arithmetic,
    Choice,
    Json,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::Arithmetic, Self::Choice, Self::Json];

    pub fn name(self) -> &'static str {
        match self {
            Self::Arithmetic => "arithmetic",
            Self::Choice => "choice",
            Self::Json => "json",
        }
    }

    /// Questions with answers as they are wanted.
    fn examples(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Arithmetic => &SUMS,
            Self::Choice => &CHOICES,
            Self::Json => &OBJECTS,
        }
    }
}

/// A question and what is right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    pub id: String,
    pub kind: Kind,
    pub question: String,
    /// In the words of a right answer; what counts is its canonical form.
    pub reference: String,
}

const SUMS: [(&str, &str); 4] = [
    ("What is 2 plus 3?", "2 plus 3 is 5. The answer is 5."),
    ("What is 6 minus 4?", "6 minus 4 is 2. The answer is 2."),
    ("What is 3 times 2?", "3 times 2 is 6. The answer is 6."),
    ("What is 1 plus 2 plus 4?", "1 plus 2 plus 4 is 7. The answer is 7."),
];

const CHOICES: [(&str, &str); 4] = [
    ("Which of these is a colour?\nA) Table\nB) Blue\nC) Dog\nD) Seven", "B) Blue"),
    ("What is the capital of Italy?\nA) London\nB) Lisbon\nC) Vienna\nD) Rome", "D) Rome"),
    ("Which animal says meow?\nA) Cat\nB) Cow\nC) Horse\nD) Bee", "A) Cat"),
    ("How many days are in a week?\nA) Five\nB) Six\nC) Seven\nD) Nine", "C) Seven"),
];

const OBJECTS: [(&str, &str); 3] = [
    ("Ann is 31 years old and lives in Paris.", r#"{"name": "Ann", "age": 31, "city": "Paris"}"#),
    ("My neighbour Tom, aged 45, has a house in Rome.", r#"{"name": "Tom", "age": 45, "city": "Rome"}"#),
    ("In Vienna lives Ida, who is 60.", r#"{"name": "Ida", "age": 60, "city": "Vienna"}"#),
];

impl Task {
    /// The conversation that a model is shown.
    pub fn messages(&self) -> Vec<Message> {
        let say = |role, text: &str| Message { role, content: vec![ContentPart::Text(text.to_owned())] };
        let examples = self.kind.examples().iter();
        let mut messages: Vec<Message> =
            examples.flat_map(|(q, a)| [say(Role::User, q), say(Role::Assistant, a)]).collect();
        messages.push(say(Role::User, &self.question));
        messages
    }

    /// What is measured of the conversation.
    pub fn signals(&self) -> Signals {
        fit::embed::measured_chat(self.messages())
    }

    /// What tells its prompt from others.
    pub fn hash(&self) -> Hash {
        let examples = self.kind.examples().iter().flat_map(|(q, a)| [*q, *a]);
        let texts: Vec<&str> = examples.chain([self.question.as_str()]).collect();
        Hash::of(texts.join("\0").as_bytes())
    }
}

/// The first `count` questions under a seed; the kinds take turns, and none is asked twice.
pub fn make(count: usize, seed: u64) -> Vec<Task> {
    let mut rng = SplitMix(seed);
    let mut tasks: Vec<Task> = Vec::new();
    while tasks.len() < count {
        let kind = Kind::ALL[tasks.len() % Kind::ALL.len()];
        let (question, reference) = match kind {
            Kind::Arithmetic => arithmetic(&mut rng),
            Kind::Choice => choice(&mut rng),
            Kind::Json => object(&mut rng),
        };
        if tasks.iter().all(|task| task.question != question) {
            let id = format!("{}-{:03}", kind.name(), tasks.len() / Kind::ALL.len());
            tasks.push(Task { id, kind, question, reference });
        }
    }
    tasks
}

/// One of a few.
fn one<T: Copy>(rng: &mut SplitMix, of: &[T]) -> T {
    of[rng.below(of.len())]
}

/// From `low` to `high`, both among them.
fn number(rng: &mut SplitMix, low: usize, high: usize) -> usize {
    low + rng.below(high - low + 1)
}

fn arithmetic(rng: &mut SplitMix) -> (String, String) {
    let (question, answer) = match rng.below(8) {
        0 | 1 => {
            let (a, b) = (number(rng, 1, 9), number(rng, 1, 9));
            (format!("{a} plus {b}"), a + b)
        }
        2 => {
            let (a, b) = (number(rng, 10, 60), number(rng, 1, 9));
            (format!("{a} plus {b}"), a + b)
        }
        3 => {
            let (a, b) = (10 * number(rng, 1, 5), 10 * number(rng, 1, 4));
            (format!("{a} plus {b}"), a + b)
        }
        4 | 5 => {
            let a = number(rng, 2, 19);
            let b = number(rng, 1, a.min(9));
            (format!("{a} minus {b}"), a - b)
        }
        6 => {
            let (a, b) = (number(rng, 1, 10), number(rng, 1, 10));
            (format!("{a} times {b}"), a * b)
        }
        _ => {
            let (a, b, c) = (number(rng, 1, 9), number(rng, 1, 9), number(rng, 1, 5));
            (format!("{a} plus {b} plus {c}"), a + b + c)
        }
    };
    (format!("What is {question}?"), answer.to_string())
}

/// A question, what is right, and three or more that are not.
const FACTS: [(&str, &str, &[&str]); 36] = [
    ("What is the capital of France?", "Paris", &["Madrid", "Berlin", "Oslo", "Athens"]),
    ("What is the capital of Japan?", "Tokyo", &["Beijing", "Delhi", "Cairo", "Lima"]),
    ("What is the capital of Spain?", "Madrid", &["Paris", "Dublin", "Warsaw", "Prague"]),
    ("What is the capital of Germany?", "Berlin", &["Paris", "Rome", "Athens", "Oslo"]),
    ("What is the capital of England?", "London", &["Paris", "Dublin", "Rome", "Berne"]),
    ("Which animal barks?", "Dog", &["Cat", "Cow", "Duck", "Fish"]),
    ("Which animal gives milk?", "Cow", &["Snake", "Eagle", "Shark", "Frog"]),
    ("Which animal can fly?", "Eagle", &["Horse", "Dog", "Snake", "Pig"]),
    ("Which animal lives in water?", "Shark", &["Lion", "Camel", "Horse", "Goat"]),
    ("What colour is grass?", "Green", &["Red", "Blue", "Black", "Pink"]),
    ("What colour is snow?", "White", &["Black", "Green", "Red", "Brown"]),
    ("What colour is a ripe banana?", "Yellow", &["Blue", "Purple", "Black", "Grey"]),
    ("What colour is blood?", "Red", &["Green", "Blue", "White", "Yellow"]),
    ("How many legs does a spider have?", "Eight", &["Two", "Six", "Four", "Ten"]),
    ("How many months are in a year?", "Twelve", &["Ten", "Seven", "Thirty", "Twenty"]),
    ("How many wheels does a bicycle have?", "Two", &["Four", "Six", "Eight", "Five"]),
    ("How many sides does a triangle have?", "Three", &["Four", "Five", "Six", "Ten"]),
    ("Which planet do we live on?", "Earth", &["Mars", "Venus", "Saturn", "Jupiter"]),
    ("Which planet is called the red planet?", "Mars", &["Earth", "Venus", "Neptune", "Saturn"]),
    ("What do bees make?", "Honey", &["Milk", "Wool", "Paper", "Glass"]),
    ("What is frozen water called?", "Ice", &["Steam", "Fog", "Rain", "Sand"]),
    ("What do we breathe?", "Air", &["Sand", "Iron", "Milk", "Wood"]),
    ("What do you use to cut paper?", "Scissors", &["Spoon", "Pillow", "Lamp", "Cup"]),
    ("What do you use to write?", "Pen", &["Fork", "Shoe", "Chair", "Hat"]),
    ("Which month comes after March?", "April", &["June", "August", "January", "October"]),
    ("Which day comes after Monday?", "Tuesday", &["Friday", "Sunday", "Saturday", "Thursday"]),
    ("What is the opposite of hot?", "Cold", &["Wet", "Loud", "Soft", "Round"]),
    ("What is the opposite of big?", "Small", &["Heavy", "Blue", "Fast", "Warm"]),
    ("What is the opposite of day?", "Night", &["Morning", "Week", "Summer", "Year"]),
    ("Who treats sick people?", "Doctor", &["Painter", "Pilot", "Baker", "Singer"]),
    ("Who flies a plane?", "Pilot", &["Baker", "Doctor", "Farmer", "Teacher"]),
    ("Who bakes bread?", "Baker", &["Pilot", "Singer", "Doctor", "Driver"]),
    ("Where do fish live?", "Water", &["Trees", "Sand", "Clouds", "Houses"]),
    ("Which season is the coldest?", "Winter", &["Summer", "Spring", "Autumn"]),
    ("Which language is spoken in France?", "French", &["Chinese", "Arabic", "Russian", "Hindi"]),
    ("What shines in the sky by day?", "Sun", &["Moon", "Lamp", "Candle", "Fire"]),
];

/// Things by what they are.
const SORTS: [(&str, &[&str]); 8] = [
    ("a fruit", &["Apple", "Banana", "Cherry", "Grape", "Lemon", "Peach"]),
    ("an animal", &["Lion", "Tiger", "Rabbit", "Monkey", "Sheep", "Wolf"]),
    ("a metal", &["Iron", "Gold", "Silver", "Copper", "Lead", "Tin"]),
    ("a country", &["Spain", "China", "Brazil", "Canada", "Egypt", "India"]),
    ("a tool", &["Hammer", "Saw", "Drill", "Spade", "Wrench", "Pliers"]),
    ("a drink", &["Tea", "Coffee", "Juice", "Wine", "Beer", "Cocoa"]),
    ("a body part", &["Hand", "Foot", "Nose", "Ear", "Knee", "Elbow"]),
    ("a piece of clothing", &["Shirt", "Sock", "Coat", "Glove", "Scarf", "Skirt"]),
];

fn choice(rng: &mut SplitMix) -> (String, String) {
    let (question, right, mut wrong): (String, &str, Vec<&str>) = match rng.below(3) {
        0 => {
            let sort = rng.below(SORTS.len());
            let others: Vec<usize> = (0..SORTS.len()).filter(|other| *other != sort).collect();
            let order = rng.order(others.len());
            let wrong = order.iter().take(3).map(|n| one(rng, SORTS[others[*n]].1)).collect();
            (format!("Which of these is {}?", SORTS[sort].0), one(rng, SORTS[sort].1), wrong)
        }
        _ => {
            let (question, right, wrong) = one(rng, &FACTS);
            (question.to_owned(), right, rng.order(wrong.len()).iter().take(3).map(|n| wrong[*n]).collect())
        }
    };
    let place = rng.below(wrong.len() + 1);
    wrong.insert(place, right);
    let letters = ["A", "B", "C", "D"];
    let lines: Vec<String> = letters.iter().zip(&wrong).map(|(letter, text)| format!("{letter}) {text}")).collect();
    (format!("{question}\n{}", lines.join("\n")), letters[place].to_owned())
}

const NAMES: [&str; 12] =
    ["Carla", "Dan", "Eve", "Frank", "Grace", "Henry", "Iris", "Jack", "Kate", "Liam", "Mona", "Nick"];
const CITIES: [&str; 12] =
    ["Oslo", "Madrid", "Lima", "Cairo", "London", "Berlin", "Tokyo", "Delhi", "Boston", "Dublin", "Athens", "Prague"];
const JOBS: [&str; 8] = ["teacher", "nurse", "baker", "pilot", "farmer", "painter", "driver", "cook"];

fn object(rng: &mut SplitMix) -> (String, String) {
    let (name, city, job) = (one(rng, &NAMES), one(rng, &CITIES), one(rng, &JOBS));
    let (age, years) = (number(rng, 18, 89), number(rng, 2, 9));
    let (text, age): (String, usize) = match rng.below(9) {
        0 => (format!("{name} is {age} years old and lives in {city}."), age),
        1 => (format!("In {city} lives {name}, who is {age}."), age),
        2 => (format!("My uncle {name}, aged {age}, has a house in {city}."), age),
        3 => (format!("{name}, a {job} of {age}, moved to {city} {years} years ago."), age),
        4 => (format!("{name} went to {city} at the age of {age}."), age),
        5 => (format!("The {job} from {city} is called {name} and turned {age} last week."), age),
        6 => {
            let friend = NAMES[(NAMES.iter().position(|n| *n == name).unwrap_or(0) + years) % NAMES.len()];
            (format!("{friend} says that {name}, {age}, works as a {job} in {city}."), age)
        }
        7 => (format!("{name} from {city} was {age} last year and is one year older now."), age + 1),
        _ => (format!("{name} lives in {city}. In {years} years {name} will be {}.", age + years), age),
    };
    let reference: Value = json!({"name": name, "age": age, "city": city});
    (text, reference.to_string())
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::cascade::canonical::{Form, form};

    #[test]
    fn the_same_seed_makes_the_same_questions_and_another_others() {
        let tasks = make(90, 1);
        assert_eq!(tasks, make(90, 1));
        assert_eq!(tasks[..30], make(30, 1)[..], "more are the same and others");
        assert_ne!(tasks, make(90, 2));
        let ids: BTreeSet<&str> = tasks.iter().map(|task| task.id.as_str()).collect();
        let hashes: BTreeSet<Hash> = tasks.iter().map(Task::hash).collect();
        assert_eq!((ids.len(), hashes.len()), (90, 90));
        for kind in Kind::ALL {
            assert_eq!(tasks.iter().filter(|task| task.kind == kind).count(), 30);
        }
    }

    #[test]
    fn references_are_right() {
        let mut letters: BTreeMap<String, usize> = BTreeMap::new();
        for task in make(500, 7) {
            match task.kind {
                Kind::Arithmetic => {
                    let words: Vec<&str> =
                        task.question.trim_start_matches("What is ").trim_end_matches('?').split(' ').collect();
                    let of = |n: usize| words[n].parse::<i64>().unwrap();
                    let sum = (1..words.len()).step_by(2).fold(of(0), |sum, op| match words[op] {
                        "plus" => sum + of(op + 1),
                        "minus" => sum - of(op + 1),
                        "times" => sum * of(op + 1),
                        other => panic!("{other}"),
                    });
                    assert_eq!(form(&task.reference), Form::Number(sum.to_string()), "{}", task.question);
                }
                Kind::Choice => {
                    let line = task.question.lines().find(|line| line.starts_with(&format!("{})", task.reference)));
                    let text = line.unwrap().split_once(") ").unwrap().1;
                    let question = task.question.lines().next().unwrap();
                    let fact = FACTS.iter().find(|fact| fact.0 == question).map(|fact| fact.1 == text);
                    let sort = || SORTS.iter().any(|(sort, of)| question.contains(sort) && of.contains(&text));
                    assert!(fact.unwrap_or_else(sort), "{}", task.question);
                    let options: BTreeSet<&str> = task.question.lines().skip(1).map(|l| &l[3..]).collect();
                    assert_eq!(options.len(), 4, "{}", task.question);
                    *letters.entry(task.reference).or_default() += 1;
                }
                Kind::Json => {
                    let Form::Json(_) = form(&task.reference) else { panic!("{}", task.reference) };
                    let value: Value = serde_json::from_str(&task.reference).unwrap();
                    for field in ["name", "city"] {
                        assert!(task.question.contains(value[field].as_str().unwrap()), "{}", task.question);
                    }
                }
            }
        }
        assert!(letters.len() == 4 && letters.values().all(|n| *n > 25), "{letters:?}");
    }

    #[test]
    fn examples_have_the_form_that_is_wanted() {
        for kind in Kind::ALL {
            for (_, answer) in kind.examples() {
                assert!(!matches!(form(answer), Form::Text(_) | Form::Code(_)), "{answer}");
            }
        }
    }
}
