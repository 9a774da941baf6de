//! Devices whose tokens a platform called dead, retired in place.
//!
//! Three indexes of devices are of those in one state: a row that changes it is written to all that it belongs in anew, one at
//! a random place among millions, where nothing that is sent ever looks. So the row keeps its state, 1, and with it its place in
//! the index that keeps a token to one row, and is retired by its `retired_at` alone, which no index knows: its new
//! version stays on its page. A device is active when its state is 1 and it was not retired: whoever asks for that asks by
//! the macros here.
//!
//! Whoever else registers the token makes it let go of it first ([`let_go`]). Replicas of earlier versions do not know
//! of any of it, so it is done only while there are none: see [`super::packing`].

use diesel::sql_types::{Array, BigInt};

use super::fail::Attempt;
use super::statement::constant;
use super::tx::Tx;
use crate::domain::ids::DeviceId;
use crate::planted;

/// [`super::rows::DeviceRow::state`] of a device that is retired in place, and holds its token; as [`select_devices`] has it.
/// Stored, it is 1.
pub(super) const IN_PLACE: i16 = 4;

/// As a condition, of a row of `device`, whose name and a dot are given, that is found by another key than by what the indexes of
/// active devices begin with: a plan made for few rows would walk one of them whole.
macro_rules! is_active {
    ($row:literal) => {
        concat!($row, "state + 0 = 1 AND ", $row, "retired_at IS NULL")
    };
}
pub(super) use is_active;

/// As a column, of the row `d`: its state, and what it is when it is retired in place.
macro_rules! state {
    ($in_place:literal) => {
        concat!("CASE WHEN d.state = 1 AND d.retired_at IS NOT NULL THEN ", $in_place, " ELSE d.state END")
    };
}
pub(super) use state;

/// [`super::rows::select_devices`], with the state of a device as it is.
macro_rules! select_devices {
    ($tail:literal) => {
        $crate::storage::rows::select_devices!(
            [$crate::storage::postgres::dead::state!("4::SMALLINT"), ", d.retired_reason, d.retired_at"] $tail
        )
    };
}
pub(super) use select_devices;

/// Devices that are retired in place, and locked: others may have their tokens.
pub(super) async fn let_go(tx: &mut Tx, devices: Vec<DeviceId>) -> Attempt<()> {
    if devices.is_empty() || planted::is("pg-dead-keeps-its-token") {
        return Ok(());
    }
    tx.execute(constant!(
        (); "UPDATE device SET state = 2 WHERE id = ANY ($1) AND retired_at IS NOT NULL",
        Array<BigInt> => super::ids(devices.iter().map(|device| device.0)),
    ))
    .await?;
    Ok(())
}
