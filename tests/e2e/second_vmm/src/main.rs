// SPDX-License-Identifier: Apache-2.0
//! A VMM and its guest driver, as small as they get, on rust-vmm's vhost-user front-end.
//!
//!     second-vmm SOCKET table|slots|log|save=FILE|load=FILE FRAMES ROOM [FRAMES ROOM]...
//!
//! Attaches the RPMB device behind SOCKET, with its memory in one memory table or in a memory slot.
//! Each file FRAMES becomes one descriptor chain with ROOM bytes for the answer, which goes to
//! FRAMES.answer. Prints the configuration space's three bytes, then the available ring's index at
//! which the device has stopped. With `log`, there is a memory table and, from the start of the queue
//! on, a dirty log, in which the used ring and the answers have to be marked and nothing else. With
//! `save`, the device's state goes to FILE at the end; with `load`, it comes from there before the
//! features are acknowledged. The crate's front-end lacks the two messages of the device state: they
//! are sent here, on the same connection, with the crate's payloads.

use std::error::Error;
use std::fs::File;
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::{env, fs, process};

use vhost::vhost_user::message::{
    FrontendReq, VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
    VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserTransferDeviceState,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{
    VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData,
};
use vm_memory::{ByteValued, Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

type Outcome<T> = Result<T, Box<dyn Error>>;

const VIRTIO_F_VERSION_1: u64 = 1 << 32;
const VRING_DESC_F_NEXT: u16 = 1;
const VRING_DESC_F_WRITE: u16 = 2;
const QUEUE_SIZE: u16 = 8;

// Guest memory: the ring, a request, an answer.
const MEMORY_START: u64 = 0x4000_0000;
const MEMORY_SIZE: usize = 0x10_0000;
const DESCRIPTOR_TABLE: u64 = MEMORY_START;
const AVAILABLE_RING: u64 = MEMORY_START + 0x1000;
const USED_RING: u64 = MEMORY_START + 0x2000;
const REQUEST: u64 = MEMORY_START + 0x4_0000;
const ANSWER: u64 = MEMORY_START + 0x8_0000;
const MOST: usize = 0x4_0000;

const LOG_PAGE: u64 = 4096;
const LOG_SIZE: u64 = (MEMORY_START + MEMORY_SIZE as u64) / LOG_PAGE / 8;
const VHOST_VRING_F_LOG: u32 = 1;

/// A device with its queue running, and the guest's side of the queue.
struct Device {
    frontend: Frontend,
    connection: UnixStream,
    memory: GuestMemoryMmap,
    kick: EventFd,
    call: EventFd,
    sent: u16,
    log: Option<File>,
}

impl Device {
    fn attach(socket: &str, mode: &str, state: Option<&str>) -> Outcome<(Device, Vec<u8>)> {
        let connection = UnixStream::connect(socket)?;
        let mut frontend = Frontend::from_stream(connection.try_clone()?, 1);
        frontend.set_owner()?;
        let offered = frontend.get_features()?;
        let wanted = VIRTIO_F_VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if offered & wanted != wanted {
            return Err(format!("features 0x{offered:x} are not enough").into());
        }
        let protocol = frontend.get_protocol_features()?
            & (VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::LOG_SHMFD
                | VhostUserProtocolFeatures::DEVICE_STATE
                | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
        frontend.set_protocol_features(protocol)?;
        if state.is_some() && !protocol.contains(VhostUserProtocolFeatures::DEVICE_STATE) {
            return Err("no device state is offered".into());
        }
        if let ("load", Some(file)) = (mode, state) {
            load(&connection, &fs::read(file)?)?;
        }
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(wanted)?;
        if frontend.get_queue_num()? != 1 {
            return Err("an RPMB device has one queue".into());
        }
        let flags = VhostUserConfigFlags::WRITABLE;
        let (_, config) = frontend.get_config(0, 3, flags, &[0; 3])?;

        let memory = guest_memory()?;
        let regions = memory
            .iter()
            .map(VhostUserMemoryRegionInfo::from_guest_region)
            .collect::<Result<Vec<_>, _>>()?;
        if mode == "slots" {
            if frontend.get_max_mem_slots()? == 0 {
                return Err("no memory slots".into());
            }
            for region in &regions {
                frontend.add_mem_region(region)?;
            }
        } else {
            frontend.set_mem_table(&regions)?;
        }

        let (kick, call) = (EventFd::new(0)?, EventFd::new(0)?);
        let host = |address| memory.get_host_address(GuestAddress(address)).map(|p| p as u64);
        frontend.set_vring_num(0, QUEUE_SIZE)?;
        frontend.set_vring_base(0, 0)?;
        let mut ring = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: host(DESCRIPTOR_TABLE)?,
            avail_ring_addr: host(AVAILABLE_RING)?,
            used_ring_addr: host(USED_RING)?,
            log_addr: None,
        };
        frontend.set_vring_addr(0, &ring)?;
        frontend.set_vring_call(0, &call)?;
        frontend.set_vring_kick(0, &kick)?;
        frontend.set_vring_enable(0, true)?;
        let mut log = None;
        if mode == "log" {
            if !protocol.contains(VhostUserProtocolFeatures::LOG_SHMFD) {
                return Err("no dirty log is offered".into());
            }
            log = Some(start_log(&frontend)?);
            frontend.set_features(wanted | VhostUserVirtioFeatures::LOG_ALL.bits())?;
            ring.flags = VHOST_VRING_F_LOG;
            ring.log_addr = Some(USED_RING);
            frontend.set_vring_addr(0, &ring)?;
        }
        let device = Device { frontend, connection, memory, kick, call, sent: 0, log };
        Ok((device, config))
    }

    /// Send one chain and wait for its answer: as many bytes as the device says that it wrote.
    fn exchange(&mut self, request: &[u8], room: usize) -> Outcome<Vec<u8>> {
        if request.len() > MOST || room > MOST {
            return Err("a request or an answer is too large".into());
        }
        self.memory.write_slice(request, GuestAddress(REQUEST))?;
        self.descriptor(0, REQUEST, request.len(), VRING_DESC_F_NEXT, 1)?;
        self.descriptor(1, ANSWER, room, VRING_DESC_F_WRITE, 0)?;
        let slot = u64::from(self.sent % QUEUE_SIZE);
        self.memory.write_obj(0u16, GuestAddress(AVAILABLE_RING + 4 + 2 * slot))?;
        self.sent = self.sent.wrapping_add(1);
        self.memory.store(self.sent, GuestAddress(AVAILABLE_RING + 2), Ordering::Release)?;
        self.kick.write(1)?;
        loop {
            let used: u16 = self.memory.load(GuestAddress(USED_RING + 2), Ordering::Acquire)?;
            if used == self.sent {
                break;
            }
            self.call.read()?;
        }
        let head: u32 = self.memory.read_obj(GuestAddress(USED_RING + 4 + 8 * slot))?;
        let length: u32 = self.memory.read_obj(GuestAddress(USED_RING + 8 + 8 * slot))?;
        if head != 0 || length as usize > room {
            return Err(format!("used element {head} with {length} bytes").into());
        }
        let mut answer = vec![0; length as usize];
        self.memory.read_slice(&mut answer, GuestAddress(ANSWER))?;
        if let Some(log) = &self.log {
            // The index is marked after it has moved; the device replies once that batch has ended.
            self.frontend.get_queue_num()?;
            check_log(log, u64::from(length))?;
        }
        Ok(answer)
    }

    fn descriptor(&self, index: u64, address: u64, length: usize, flags: u16, next: u16) -> Outcome<()> {
        let at = DESCRIPTOR_TABLE + 16 * index;
        self.memory.write_obj(address, GuestAddress(at))?;
        self.memory.write_obj(length as u32, GuestAddress(at + 8))?;
        self.memory.write_obj(flags, GuestAddress(at + 12))?;
        self.memory.write_obj(next, GuestAddress(at + 14))?;
        Ok(())
    }
}

/// Take the state of the device, whose queue is stopped.
fn save(connection: &UnixStream) -> Outcome<Vec<u8>> {
    let (mut reading, writing) = pipe()?;
    transfer(connection, VhostTransferStateDirection::SAVE, writing)?;
    let mut state = Vec::new();
    reading.read_to_end(&mut state)?;
    check(connection)?;
    Ok(state)
}

/// Give the device the state with which it arrives.
fn load(connection: &UnixStream, state: &[u8]) -> Outcome<()> {
    let (reading, mut writing) = pipe()?;
    transfer(connection, VhostTransferStateDirection::LOAD, reading)?;
    writing.write_all(state)?;
    drop(writing);
    check(connection)
}

/// Send SET_DEVICE_STATE_FD with one end of a pipe, which the device has to use.
fn transfer(connection: &UnixStream, to: VhostTransferStateDirection, end: File) -> Outcome<()> {
    let payload = VhostUserTransferDeviceState::new(to, VhostTransferStatePhase::STOPPED);
    let request = FrontendReq::SET_DEVICE_STATE_FD;
    match ask(connection, request, payload.as_slice(), &[end.as_raw_fd()])? {
        0x100 => Ok(()),
        reply => Err(format!("reply 0x{reply:x} to SET_DEVICE_STATE_FD").into()),
    }
}

/// Send CHECK_DEVICE_STATE; the reply comes when the transfer has ended.
fn check(connection: &UnixStream) -> Outcome<()> {
    match ask(connection, FrontendReq::CHECK_DEVICE_STATE, &[], &[])? {
        0 => Ok(()),
        reply => Err(format!("reply {reply} to CHECK_DEVICE_STATE").into()),
    }
}

/// Send a message between two of the crate's front-end, and return the number in the reply.
fn ask(mut connection: &UnixStream, request: FrontendReq, payload: &[u8], fds: &[i32]) -> Outcome<u64> {
    let code = u32::from(request);
    let mut message = Vec::new();
    for word in [code, 1, payload.len() as u32] {
        message.extend(word.to_ne_bytes());
    }
    message.extend(payload);
    if connection.send_with_fds(&[message.as_slice()], fds)? != message.len() {
        return Err("a message was cut".into());
    }
    let mut reply = [0; 12 + 8];
    connection.read_exact(&mut reply)?;
    let word = |at: usize| u32::from_ne_bytes(reply[at..at + 4].try_into().unwrap());
    if (word(0), word(4), word(8)) != (code, 1 | VhostUserHeaderFlag::REPLY.bits(), 8) {
        return Err(format!("reply to message {code}: {reply:?}").into());
    }
    Ok(u64::from_ne_bytes(reply[12..].try_into().unwrap()))
}

/// The reading and the writing end of a pipe.
fn pipe() -> Outcome<(File, File)> {
    let mut ends = [0; 2];
    // SAFETY: there is room for two descriptors, which are new and nobody else's.
    unsafe {
        if libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        Ok((File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])))
    }
}

/// Let the device mark what it writes. Its reply is the description of the log, which this version
/// of the crate takes for an acknowledgement; later ones expect it.
fn start_log(frontend: &Frontend) -> Outcome<File> {
    let file = memory_file(LOG_SIZE)?;
    let region = VhostUserDirtyLogRegion {
        mmap_size: LOG_SIZE,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    frontend.set_hdr_flags(VhostUserHeaderFlag::empty());
    frontend.set_log_base(0, Some(region))?;
    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    let mut reply = [0u8; 12 + 16];
    // SAFETY: the buffer has as many bytes as the call may write.
    let read = unsafe {
        libc::recv(frontend.as_raw_fd(), reply.as_mut_ptr().cast(), reply.len(), libc::MSG_WAITALL)
    };
    let number = |at: usize| u64::from_ne_bytes(reply[at..at + 8].try_into().unwrap());
    if read != reply.len() as isize || (number(12), number(20)) != (LOG_SIZE, 0) {
        return Err(format!("reply to SET_LOG_BASE: {read} bytes, {reply:?}").into());
    }
    Ok(file)
}

/// Check that the used ring and an answer of so many bytes are marked, and nothing else; clear it.
fn check_log(log: &File, length: u64) -> Outcome<()> {
    let mut bits = vec![0; LOG_SIZE as usize];
    log.read_exact_at(&mut bits, 0)?;
    let marked: BTreeSet<u64> = (0..8 * LOG_SIZE)
        .filter(|page| bits[(page / 8) as usize] >> (page % 8) & 1 == 1)
        .collect();
    let mut written = BTreeSet::from([USED_RING / LOG_PAGE]);
    written.extend((0..length).map(|offset| (ANSWER + offset) / LOG_PAGE));
    if marked != written {
        return Err(format!("the pages {marked:x?} are marked instead of {written:x?}").into());
    }
    log.write_all_at(&vec![0; bits.len()], 0)?; // nothing is in flight
    Ok(())
}

/// A file of memory, which the device can map too.
fn memory_file(size: u64) -> Outcome<File> {
    // SAFETY: the name is a C string, and the descriptor is new and nobody else's.
    let file = unsafe {
        let descriptor = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
        if descriptor < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        File::from_raw_fd(descriptor)
    };
    file.set_len(size)?;
    Ok(file)
}

fn guest_memory() -> Outcome<GuestMemoryMmap> {
    let file = memory_file(MEMORY_SIZE as u64)?;
    let range = (GuestAddress(MEMORY_START), MEMORY_SIZE, Some(FileOffset::new(file, 0)));
    Ok(GuestMemoryMmap::from_ranges_with_files([range])?)
}

fn run(arguments: &[String]) -> Outcome<()> {
    let [socket, mode, requests @ ..] = arguments else {
        return Err("usage: second-vmm SOCKET MODE FRAMES ROOM [FRAMES ROOM]...".into());
    };
    let (mode, state) = match mode.split_once('=') {
        Some((mode, file)) => (mode, Some(file)),
        None => (mode.as_str(), None),
    };
    let (mut device, config) = Device::attach(socket, mode, state)?;
    println!("config {config:?}");
    for pair in requests.chunks(2) {
        let [frames, room] = pair else {
            return Err("FRAMES without ROOM".into());
        };
        let answer = device.exchange(&fs::read(frames)?, room.parse()?)?;
        fs::write(format!("{frames}.answer"), answer)?;
    }
    println!("stopped at {}", device.frontend.get_vring_base(0)?);
    if let ("save", Some(file)) = (mode, state) {
        fs::write(file, save(&device.connection)?)?;
    }
    Ok(())
}

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if let Err(error) = run(&arguments) {
        eprintln!("second-vmm: {error}");
        process::exit(1);
    }
}
