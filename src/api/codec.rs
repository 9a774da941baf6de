//! The wire codec: prost's, but bytes that are no message are the caller's mistake (INVALID_ARGUMENT), not ours.
//!
//! tonic-prost answers INTERNAL, which stands for our bugs here. The most likely case is `data` nested deeper than
//! prost's limit of 100 messages, which is refused while reading so that it cannot overflow the stack.

use std::marker::PhantomData;

use prost::Message;
use tonic::Status;
use tonic::codec::{BufferSettings, Codec as TonicCodec, DecodeBuf, Decoder as TonicDecoder};
use tonic_prost::ProstEncoder;

use super::status;

/// What a call's answers are written to, at first. One answer has a hundred bytes, and waits with all that the same commit answers:
/// tonic's 8 KiB for each are two pages of memory of which the first line is used.
const ANSWER_BYTES: usize = 512;
/// Answers of a stream that are ready together leave together, up to so many bytes: tonic's own.
const TOGETHER_BYTES: usize = 32 * 1024;

pub struct Codec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> TonicCodec for Codec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = Decoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(BufferSettings::new(ANSWER_BYTES, TOGETHER_BYTES))
    }

    fn decoder(&mut self) -> Self::Decoder {
        Decoder(PhantomData)
    }
}

pub struct Decoder<U>(PhantomData<U>);

impl<U: Message + Default> TonicDecoder for Decoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, bytes: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        U::decode(bytes).map(Some).map_err(|error| status::unreadable(&error))
    }
}
