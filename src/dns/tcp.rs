//! DNS over TCP (RFC 7766).

use std::{collections::VecDeque, io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use futures::stream::{FuturesUnordered, StreamExt as _};
use hickory_proto::op::ResponseCode;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::{
        OwnedSemaphorePermit, Semaphore,
        mpsc::{Receiver, Sender, channel},
    },
    time::{Instant, timeout, timeout_at},
};

use super::{
    answer::Answer,
    forward::Forwarder,
    handler::{Action, Handler, May, Transport},
    places::Places,
    waiting::{Budget, Waiting},
};

/// A connection without a question is closed after this long (RFC 7766, 6.2.3 leaves it to the server).
const IDLE: Duration = Duration::from_secs(10);
/// So long a question waits that comes before the source has been read: clients wait for five seconds (resolv.conf(5)).
const EARLY: Duration = Duration::from_secs(5);
/// A client that does not take its answer has this long.
const SLOW: Duration = Duration::from_secs(5);

/// Who has been answered has this long to close a connection that ends.
const LINGER: Duration = Duration::from_secs(1);

/// Questions of one connection that are answered at a time.
const AT_ONCE: usize = 16;
/// No question is longer: a name has 255 bytes, and what comes with it (RFC 6891) not many more.
const LONGEST: u16 = 4096;
/// While too many bytes of answers wait for clients, it is looked this often whether there are fewer.
const LOOK: Duration = Duration::from_millis(20);

/// Answers connections. `all` are the bytes of answers that wait, here and at other addresses.
pub(super) async fn serve_tcp(
    listener: TcpListener,
    handler: Arc<Handler<Forwarder>>,
    places: Arc<Places>,
    all: Arc<Budget>,
) {
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(e) => {
                // Out of files, mostly: someone has to give one back first.
                tracing::debug!("DNS can't accept: {e}");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        // Who gets no answers takes no place from those who do.
        if handler.may(from.ip()) == May::Not {
            handler.metrics.limited("client");
            continue;
        }
        let Some(place) = places.take(from.ip()) else {
            handler.metrics.limited("connections");
            continue;
        };
        let (handler, all) = (handler.clone(), all.clone());
        tokio::spawn(async move {
            if is_admitted(from, &handler).await {
                // It ends when the client does, or takes too long.
                let _ = converse(stream, from, &handler, &all).await;
            }
            drop(place);
        });
    }
}

/// Whether a client gets answers: who may be a pod of this node waits until that is known.
async fn is_admitted(from: SocketAddr, handler: &Handler<Forwarder>) -> bool {
    let patience = Instant::now() + EARLY;
    loop {
        match handler.may(from.ip()) {
            May::Ask => return true,
            May::NotKnown if Instant::now() < patience => tokio::time::sleep(EARLY / 50).await,
            May::NotKnown => {
                handler.metrics.limited("early");
                return false;
            }
            May::Not => {
                handler.metrics.limited("client");
                return false;
            }
        }
    }
}

/// Answers the questions of a connection, several at a time and each as soon as it can be (RFC 7766, 6.2.1.1).
async fn converse(
    mut stream: TcpStream,
    from: SocketAddr,
    handler: &Handler<Forwarder>,
    all: &Arc<Budget>,
) -> io::Result<()> {
    // An answer is one write.
    stream.set_nodelay(true)?;
    let (mut reader, mut writer) = stream.split();
    let (asked, questions) = channel(1);
    {
        let mut answering = pin!(answer(&mut writer, questions, from, handler, Waiting::new(all, from.ip())));
        tokio::select! {
            answered = &mut answering => answered?,
            // What has been asked is answered all the same.
            () = read(&mut reader, asked, handler) => answering.await?,
        }
    }
    writer.shutdown().await?;
    // What is closed with something unread is reset, and answers that are still on their way are lost.
    let mut rest = [0; 512];
    let unread = async { while reader.read(&mut rest).await.is_ok_and(|n| n > 0) {} };
    let _ = timeout(LINGER, unread).await;
    Ok(())
}

/// A question, and its place among those of its connection.
type Question = (Vec<u8>, OwnedSemaphorePermit);

/// Reads until the client ends, or says what can't be a question. Who has asked enough at once is read no further until it has an
/// answer.
async fn read(from: &mut ReadHalf<'_>, to: Sender<Question>, handler: &Handler<Forwarder>) {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let Ok(Ok(length)) = timeout(IDLE, from.read_u16()).await else { return };
        if length > LONGEST {
            handler.metrics.limited("noise");
            return;
        }
        let mut packet = vec![0; usize::from(length)];
        let Ok(Ok(_)) = timeout(IDLE, from.read_exact(&mut packet)).await else { return };
        if to.send((packet, place)).await.is_err() {
            return;
        }
    }
}

/// Writes answers as they come, until there are no more questions. Lookups go on while a client takes its time to read: what they
/// hold is not its own alone.
async fn answer(
    to: &mut WriteHalf<'_>,
    mut questions: Receiver<Question>,
    from: SocketAddr,
    handler: &Handler<Forwarder>,
    waiting: Waiting,
) -> io::Result<()> {
    let waiting = &waiting;
    let mut running = FuturesUnordered::new();
    let mut ready = Ready { waiting, replies: VecDeque::new(), sent: 0, until: Instant::now() };
    let mut more = true;
    // A question that came while there is too much, and since when it is others' that is.
    let mut held: Option<(Question, Instant)> = None;
    loop {
        if let Some((_, since)) = &mut held {
            if !waiting.is_much_elsewhere() {
                *since = Instant::now();
            } else if since.elapsed() > SLOW {
                // Its client may have more luck with someone else. What was asked before is answered.
                handler.metrics.limited("send");
                (more, held) = (false, None);
            }
        }
        if !waiting.is_much()
            && let Some(((packet, place), _)) = held.take()
        {
            running.push(async move { (reply(packet, from, handler, waiting).await, place) });
        }
        tokio::select! {
            // What is ready goes before what is new, or it would heap up.
            biased;
            written = ready.write(to), if !ready.replies.is_empty() => written?,
            Some((reply, place)) = running.next() => match reply {
                Some(reply) => ready.push(reply, place)?,
                // What has no answer ends the connection, since silence would have the client wait; but not for the others.
                None => (more, held) = (false, None),
            },
            // Whether there is room is asked again when it is there: meanwhile others may have taken it.
            question = questions.recv(), if more && held.is_none() => match question {
                Some(question) => held = Some((question, Instant::now())),
                None => more = false,
            },
            // Others' answers have to be taken first, and nobody tells that they were.
            () = tokio::time::sleep(LOOK), if held.is_some() => {}
            else => return Ok(()),
        }
    }
}

/// Answers that their client has not taken yet.
struct Ready<'a> {
    waiting: &'a Waiting,
    /// As they are written, each with its place.
    replies: VecDeque<(Vec<u8>, OwnedSemaphorePermit)>,
    /// Bytes of the first that have been written.
    sent: usize,
    /// Until when it has to be taken.
    until: Instant,
}

impl Ready<'_> {
    fn push(&mut self, reply: Vec<u8>, place: OwnedSemaphorePermit) -> io::Result<()> {
        let length = u16::try_from(reply.len()).map_err(io::Error::other)?;
        if self.replies.is_empty() {
            self.until = Instant::now() + SLOW;
        }
        let mut bytes = Vec::with_capacity(reply.len() + 2);
        bytes.extend(length.to_be_bytes());
        bytes.extend(reply);
        self.waiting.add(bytes.len());
        self.replies.push_back((bytes, place));
        Ok(())
    }

    /// Writes what can be written of the first one. Nothing is lost where this is dropped.
    async fn write(&mut self, to: &mut WriteHalf<'_>) -> io::Result<()> {
        let Some((reply, _)) = self.replies.front() else { return Ok(()) };
        let n = timeout_at(self.until, to.write(reply.get(self.sent..).unwrap_or_default())).await??;
        if n == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.sent += n;
        let length = reply.len();
        if self.sent >= length {
            self.replies.pop_front();
            self.waiting.remove(length);
            self.sent = 0;
            self.until = Instant::now() + SLOW;
        }
        Ok(())
    }
}

/// The answer to one question, where so many bytes of answers wait before it.
async fn reply(
    packet: Vec<u8>,
    from: SocketAddr,
    handler: &Handler<Forwarder>,
    waiting: &Waiting,
) -> Option<Vec<u8>> {
    let patience = Instant::now() + EARLY;
    let mut action = handler.handle(&packet, from, Transport::Tcp);
    drop(packet);
    let mut found = None;
    loop {
        action = match action {
            Action::Reply(reply) => return Some(reply),
            Action::Ignore => return None,
            Action::Forward(asked) => {
                let answer = handler.elsewhere.as_ref()?.lookup(&asked.query, from.ip()).await;
                let full = waiting.is_much();
                if full {
                    handler.metrics.limited("send");
                }
                let failure = || Arc::new(Answer::code(ResponseCode::ServFail));
                let answer = answer.filter(|_| !full).unwrap_or_else(failure);
                handler.forwarded(asked, found.insert(answer))
            }
            // Silence is what makes a client ask again by UDP; here it would be an end, which clients take as final.
            Action::Later(asked) if Instant::now() < patience => {
                tokio::time::sleep(EARLY / 50).await;
                match &found {
                    // What others say of it is not asked again.
                    Some(answer) => handler.forwarded(asked, answer),
                    None => handler.look(asked),
                }
            }
            Action::Later(asked) => {
                handler.metrics.limited("early");
                // Of what is in the source and not yet in the kernel it can be said that it fails, and the connection goes on.
                if !handler.shared.table.load().is_synced() {
                    return None;
                }
                match handler.forwarded(asked, &Answer::code(ResponseCode::ServFail)) {
                    Action::Reply(reply) => return Some(reply),
                    _ => return None,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, time::Instant as Began};

    use arc_swap::{ArcSwap, ArcSwapOption};
    use hickory_proto::{
        op::{Message, Query},
        rr::{Name, RecordType},
    };

    use super::*;
    use crate::{
        dns::{
            handler::Shared,
            limit::{Allowed, PRIVATE, Rate},
            tests::some,
            waiting::OF_ALL,
        },
        metrics::DnsMetrics,
    };

    fn handler() -> Handler<Forwarder> {
        let shared = Shared {
            table: ArcSwap::new(some().publish(true)),
            node: ArcSwap::from_pointee(BTreeSet::new()),
            pods: ArcSwapOption::from_pointee(Allowed::default()),
        };
        Handler {
            shared: Arc::new(shared),
            elsewhere: None,
            allowed: Allowed::new(PRIVATE.iter().map(|range| range.parse().unwrap()).collect()),
            rate: Rate::new(0),
            metrics: DnsMetrics::default(),
            patient_until: Began::now(),
            remembered: [].into(),
        }
    }

    /// A client's end of a connection, the server's, and where the client is.
    async fn connected() -> (TcpStream, TcpStream, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, from) = listener.accept().await.unwrap();
        (client, stream, from)
    }

    async fn ask(client: &mut TcpStream) {
        let mut question = Message::query();
        let name = Name::from_ascii("vote.default.mesh.internal.").unwrap();
        question.add_query(Query::query(name, RecordType::A));
        let bytes = question.to_vec().unwrap();
        client.write_u16(u16::try_from(bytes.len()).unwrap()).await.unwrap();
        client.write_all(&bytes).await.unwrap();
    }

    /// More than may wait for all.
    fn much_of_others(all: &Arc<Budget>) -> Waiting {
        let others = Waiting::new(all, [10, 0, 0, 9].into());
        others.add(OF_ALL + 1);
        others
    }

    #[test]
    fn who_has_waited_for_others_for_long_is_not_kept_waiting() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (mut client, stream, from) = connected().await;
            let (handler, all) = (handler(), Arc::default());
            let _others = much_of_others(&all);
            ask(&mut client).await;
            let begun = Began::now();
            let served = timeout(SLOW + IDLE, converse(stream, from, &handler, &all)).await.unwrap();
            assert!(served.is_ok(), "{served:?}");
            assert!((SLOW..SLOW + SLOW / 2).contains(&begun.elapsed()), "{:?}", begun.elapsed());
        });
    }

    /// Whoever else takes nothing.
    #[test]
    fn a_question_that_comes_when_there_is_no_room_any_more_waits() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (mut client, stream, from) = connected().await;
            let (handler, all) = (handler(), Arc::default());
            let asking = async {
                // It is being waited for while there is room.
                tokio::time::sleep(Duration::from_millis(100)).await;
                let others = much_of_others(&all);
                ask(&mut client).await;
                assert!(timeout(Duration::from_millis(300), client.read_u16()).await.is_err());
                drop(others);
                assert!(timeout(Duration::from_secs(5), client.read_u16()).await.unwrap().is_ok());
                drop(client);
            };
            futures::future::join(asking, converse(stream, from, &handler, &all)).await.1.ok();
        });
    }

    #[test]
    fn while_too_much_waits_everywhere_no_question_is_taken() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (mut client, stream, from) = connected().await;
            let (handler, all) = (handler(), Arc::default());
            let others = much_of_others(&all);
            let asking = async {
                ask(&mut client).await;
                assert!(timeout(Duration::from_millis(300), client.read_u16()).await.is_err());
                // Others have taken theirs.
                drop(others);
                let length = timeout(Duration::from_secs(5), client.read_u16()).await.unwrap().unwrap();
                let mut answer = vec![0; length.into()];
                client.read_exact(&mut answer).await.unwrap();
                drop(client);
                Message::from_vec(&answer).unwrap().answers.len()
            };
            let (answers, served) =
                futures::future::join(asking, converse(stream, from, &handler, &all)).await;
            assert!(answers == 1 && served.is_ok(), "{answers} {served:?}");
            assert_eq!(all.all(), 0);
        });
    }
}
