use crate::api::proto;
use crate::domain::device::Device;
use crate::domain::platform::{DeviceKind, Environment, Permission, Platform};
use crate::domain::time::UnixMs;
use crate::domain::violation::Violations;
use crate::service::devices::{ListDevices, RegisterDevice, UnregisterDevice};

use super::values::{read_enum, read_labels, read_time, time};

pub fn register_device(violations: &mut Violations, message: proto::RegisterDeviceRequest) -> RegisterDevice {
    let kind = read_enum(violations, "kind", message.kind, |kind| match kind {
        proto::device::Kind::Unspecified | proto::device::Kind::Alert => Some(DeviceKind::Alert),
    });
    let environment = environment(violations, message.apns_environment);
    let permission = read_enum(violations, "permission", message.permission, |value| match value {
        proto::device::Permission::Unspecified | proto::device::Permission::Unknown => None,
        proto::device::Permission::Granted => Some(Permission::Granted),
        proto::device::Permission::Denied => Some(Permission::Denied),
        proto::device::Permission::Provisional => Some(Permission::Provisional),
    });
    RegisterDevice {
        user_id: message.user_id,
        platform: platform(violations, message.platform),
        token: message.token,
        kind: kind.unwrap_or(DeviceKind::Alert),
        credential: message.credential,
        environment,
        apns_topic: message.apns_topic,
        installation_id: message.installation_id,
        device_id: message.device_id,
        locale: message.locale,
        time_zone: message.time_zone,
        app_version: message.app_version,
        os_version: message.os_version,
        permission: permission.unwrap_or_default(),
        labels: read_labels(message.labels),
        observed_at: read_time(violations, "observed_at", message.observed_at),
    }
}

/// Of an imported device.
pub fn created_at(violations: &mut Violations, at: Option<prost_types::Timestamp>) -> Option<UnixMs> {
    read_time(violations, "created_at", at)
}

pub fn unregister_device(violations: &mut Violations, message: proto::UnregisterDeviceRequest) -> UnregisterDevice {
    UnregisterDevice {
        user_id: message.user_id,
        device_id: message.device_id,
        platform: platform(violations, message.platform),
        token: message.token,
        observed_at: read_time(violations, "observed_at", message.observed_at),
    }
}

pub fn list_devices(message: proto::ListDevicesRequest) -> ListDevices {
    ListDevices { user_id: message.user_id, page_size: message.page_size, page_token: message.page_token }
}

pub(super) fn shown_platform(platform: Platform) -> proto::device::Platform {
    match platform {
        Platform::Apns => proto::device::Platform::Apns,
        Platform::Fcm => proto::device::Platform::Fcm,
    }
}

pub(super) fn environment(violations: &mut Violations, value: i32) -> Option<Environment> {
    read_enum(violations, "apns_environment", value, |value| match value {
        proto::device::ApnsEnvironment::Unspecified => None,
        proto::device::ApnsEnvironment::Production => Some(Environment::Production),
        proto::device::ApnsEnvironment::Sandbox => Some(Environment::Sandbox),
    })
}

pub(super) fn shown_environment(environment: Environment) -> proto::device::ApnsEnvironment {
    match environment {
        Environment::None => proto::device::ApnsEnvironment::Unspecified,
        Environment::Production => proto::device::ApnsEnvironment::Production,
        Environment::Sandbox => proto::device::ApnsEnvironment::Sandbox,
    }
}

pub(super) fn platform(violations: &mut Violations, value: i32) -> Option<Platform> {
    read_enum(violations, "platform", value, |platform| match platform {
        proto::device::Platform::Unspecified => None,
        proto::device::Platform::Apns => Some(Platform::Apns),
        proto::device::Platform::Fcm => Some(Platform::Fcm),
    })
}

pub fn device(device: Device) -> proto::Device {
    use proto::device::{Kind, Permission as ProtoPermission};
    let kind = match device.kind {
        DeviceKind::Alert => Kind::Alert,
    };
    let permission = match device.details.permission {
        Permission::Unknown => ProtoPermission::Unknown,
        Permission::Granted => ProtoPermission::Granted,
        Permission::Denied => ProtoPermission::Denied,
        Permission::Provisional => ProtoPermission::Provisional,
    };
    proto::Device {
        device_id: device.id.public(),
        user_id: device.user.to_string(),
        platform: shown_platform(device.platform).into(),
        kind: kind.into(),
        credential: device.credential,
        apns_environment: shown_environment(device.environment).into(),
        apns_topic: device.bundle,
        installation_id: device.installation_id.unwrap_or_default(),
        locale: device.details.locale.map_or_else(String::new, |locale| locale.to_string()),
        time_zone: device.details.time_zone.unwrap_or_default(),
        app_version: device.details.app_version.unwrap_or_default(),
        os_version: device.details.os_version.unwrap_or_default(),
        permission: permission.into(),
        labels: device.details.labels.into_iter().collect(),
        active: Some(device.active),
        retired_reason: device.retired_reason.unwrap_or_default(),
        created_at: Some(time(device.created_at)),
        observed_at: Some(time(device.observed_at)),
        confirmed_at: Some(time(device.confirmed_at)),
        retired_at: device.retired_at.map(time),
    }
}
