//! What is told of a panic: where it happened, never what it was about. A message that
//! was put together may hold what a person said, e.g. the text that was sliced.

use std::{backtrace::Backtrace, panic::PanicHookInfo};

/// Stands in the place of a message that was put together.
const WITHHELD: &str = "(its message is withheld: it may hold personal data)";

/// From now on panics go to the log, without what they may give away.
pub fn install() {
    std::panic::set_hook(Box::new(tell));
}

fn tell(info: &PanicHookInfo<'_>) {
    let location = info.location().map(ToString::to_string);
    let thread = std::thread::current();
    // Names of functions and files alone; empty unless RUST_BACKTRACE is set.
    let backtrace = Backtrace::capture();
    tracing::error!(
        location = location.as_deref().unwrap_or("unknown"),
        thread = thread.name().unwrap_or("unnamed"),
        message = message(info),
        %backtrace,
        "a panic: a fault of the relay; please report it"
    );
}

/// A text that stands in the program is no secret.
fn message<'a>(info: &'a PanicHookInfo<'_>) -> &'a str {
    let literal = info.payload().downcast_ref::<&'static str>();
    literal.map_or(WITHHELD, |text| text)
}

#[cfg(test)]
mod tests {
    use std::{
        panic::catch_unwind,
        sync::{Mutex, PoisonError},
    };

    use super::*;

    /// What is told of a panic.
    fn told(panics: fn()) -> String {
        static TOLD: Mutex<Option<String>> = Mutex::new(None);
        // The hook is the whole process's: other tests may panic meanwhile.
        static ONE: Mutex<()> = Mutex::new(());
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let own = std::thread::current().id();
        let former = std::sync::Arc::new(std::panic::take_hook());
        let others = std::sync::Arc::clone(&former);
        std::panic::set_hook(Box::new(move |info| {
            if std::thread::current().id() == own {
                *TOLD.lock().unwrap_or_else(PoisonError::into_inner) = Some(message(info).into());
            } else {
                others(info);
            }
        }));
        catch_unwind(panics).expect_err("it panics");
        std::panic::set_hook(Box::new(move |info| former(info)));
        let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
        told.take().expect("the hook was called")
    }

    #[test]
    fn a_panic_tells_nothing_of_what_was_sliced_or_formatted() {
        assert_eq!(told(|| panic!("a literal")), "a literal");
        assert_eq!(told(|| panic!("{}", "planted".to_owned())), WITHHELD);
        let slice = || {
            let address = "plänted@example.com".to_owned();
            std::hint::black_box(&address[..3]);
        };
        assert_eq!(told(slice), WITHHELD);
        let unwrap = || {
            let failed: Result<(), _> = Err("planted".to_owned());
            std::hint::black_box(failed).expect("fine");
        };
        assert_eq!(told(unwrap), WITHHELD);
    }
}
