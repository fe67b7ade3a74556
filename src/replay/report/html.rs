//! A document as one HTML file.

use minijinja::{Environment, Value, context, value::Serde};

use super::{Document, Part};

const TEMPLATE: &str = include_str!("report.html.j2");

impl Document {
    /// The page; it asks the network for nothing.
    ///
    /// # Errors
    /// When the template of this build fails, which a test renders.
    pub fn html(&self) -> Result<String, minijinja::Error> {
        let mut environment = Environment::new();
        environment.add_template("report.html", TEMPLATE)?;
        let drawn = |part: &Part| match part {
            Part::Chart(chart) => {
                let legend: Vec<Value> =
                    chart.legend().into_iter().map(|(c, n)| context!(colour => c, name => n)).collect();
                context!(kind => "chart", title => chart.title.clone(), svg => Value::from_safe_string(chart.svg()), legend => legend)
            }
            other => Value::from(Serde(other)),
        };
        let sections: Vec<Value> = self
            .sections
            .iter()
            .map(|s| {
                let parts: Vec<Value> = s.parts.iter().map(drawn).collect();
                context!(heading => s.heading.clone(), note => s.note.clone(), parts => parts)
            })
            .collect();
        environment.get_template("report.html")?.render(
            context!(title => self.title.clone(), facts => Value::from(Serde(&self.facts)), sections => sections),
        )
    }
}
