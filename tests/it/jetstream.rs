//! Relays that share an outbox: three of them as processes, on three clustered servers.

mod access;
mod credentials;
mod handover;
mod init;
mod moving;
mod outage;
mod proof;
mod relays;
mod two;
