-- SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-or-later
-- farplug usbredir dissector
--
-- Wireshark dissector for usbredir, protocol 0.7: over TCP or UNIX sockets (captured by farplug), and inside the
-- usbredir channels of SPICE. Written for Lua 5.2 to 5.4: no bit operators, no integer division.
--
-- Install it with "farplug capture --install-dissector", or copy it into Wireshark's folder "Personal Lua Plugins"
-- (Help > About Wireshark > Folders). Filters begin with "usbredir.", for example: usbredir.type == 101
--
-- Source: usb-redirection-protocol.md, version 0.7.

local usbredir = Proto("usbredir", "USB Redirection")
local inside = Proto("usbredir_spice", "USB Redirection in SPICE")

local TYPES = {
  [0] = "hello", "device_connect", "device_disconnect", "reset", "interface_info", "ep_info", "set_configuration",
  "get_configuration", "configuration_status", "set_alt_setting", "get_alt_setting", "alt_setting_status",
  "start_iso_stream", "stop_iso_stream", "iso_stream_status", "start_interrupt_receiving",
  "stop_interrupt_receiving", "interrupt_receiving_status", "alloc_bulk_streams", "free_bulk_streams",
  "bulk_streams_status", "cancel_data_packet", "filter_reject", "filter_filter", "device_disconnect_ack",
  "start_bulk_receiving", "stop_bulk_receiving", "bulk_receiving_status",
  [100] = "control_packet", [101] = "bulk_packet", [102] = "iso_packet", [103] = "interrupt_packet",
  [104] = "buffered_bulk_packet",
}
local STATUSES = { [0] = "success", "cancelled", "inval", "ioerror", "stall", "timeout", "babble" }
local SPEEDS = { [0] = "low", "full", "high", "super", [255] = "unknown" }
local ENDPOINT_TYPES = { [0] = "control", "iso", "bulk", "interrupt", [255] = "none" }
local CAPABILITIES = {
  "bulk_streams", "connect_device_version", "filter", "device_disconnect_ack", "ep_info_max_packet_size",
  "64bits_ids", "32bits_bulk_length", "bulk_receiving",
}
local HELLO, BULK, BULK_STREAMS_STATUS, BULK_RECEIVING_STATUS, FILTER = 0, 101, 20, 27, 23
local VERSION_SIZE = 64
local FIRST_DATA_TYPE = 100
local KEPT = 4096 -- bytes of a packet that are shown; of a large payload, the beginning

-- Fields: name, number of bytes, and how the field is shown.
local fields = {}
local function field(name, kind, title, ...)
  fields[name] = ProtoField[kind]("usbredir." .. name, title, ...)
end
field("type", "uint32", "Type", base.DEC, TYPES)
field("length", "uint32", "Length", base.DEC)
field("id", "uint64", "Id", base.HEX)
field("version", "stringz", "Version")
field("caps", "uint32", "Capabilities", base.HEX)
field("endpoint", "uint8", "Endpoint", base.HEX)
field("status", "uint8", "Status", base.DEC, STATUSES)
field("data_length", "uint32", "Data length", base.DEC)
field("stream_id", "uint32", "Stream id", base.DEC)
field("request", "uint8", "bRequest", base.HEX)
field("request_type", "uint8", "bmRequestType", base.HEX)
field("value", "uint16", "wValue", base.HEX)
field("index", "uint16", "wIndex", base.HEX)
field("wlength", "uint16", "wLength", base.DEC)
field("speed", "uint8", "Speed", base.DEC, SPEEDS)
field("class", "uint8", "Class", base.HEX)
field("subclass", "uint8", "Subclass", base.HEX)
field("protocol", "uint8", "Protocol", base.HEX)
field("vendor", "uint16", "idVendor", base.HEX)
field("product", "uint16", "idProduct", base.HEX)
field("device_version", "uint16", "bcdDevice", base.HEX)
field("configuration", "uint8", "Configuration", base.DEC)
field("interface", "uint8", "Interface", base.DEC)
field("interface_count", "uint32", "Interfaces", base.DEC)
field("alt", "uint8", "Alternate setting", base.DEC)
field("packets_per_urb", "uint8", "Packets per URB", base.DEC)
field("urbs", "uint8", "URBs", base.DEC)
field("bytes_per_transfer", "uint32", "Bytes per transfer", base.DEC)
field("transfers", "uint8", "Transfers", base.DEC)
field("endpoints", "uint32", "Endpoints", base.HEX)
field("streams", "uint32", "Streams", base.DEC)
field("filter", "string", "Filter")
field("data", "bytes", "Data")
field("rest", "bytes", "Further bytes")
local registered = {}
for _, one in pairs(fields) do registered[#registered + 1] = one end
usbredir.fields = registered

-- The fields of each type header: names and sizes in bytes, in the order on the wire.
local LAYOUTS = {
  [1] = { "speed", 1, "class", 1, "subclass", 1, "protocol", 1, "vendor", 2, "product", 2, "device_version", 2 },
  [6] = { "configuration", 1 },
  [8] = { "status", 1, "configuration", 1 },
  [9] = { "interface", 1, "alt", 1 },
  [10] = { "interface", 1 },
  [11] = { "status", 1, "interface", 1, "alt", 1 },
  [12] = { "endpoint", 1, "packets_per_urb", 1, "urbs", 1 },
  [13] = { "endpoint", 1 },
  [14] = { "status", 1, "endpoint", 1 },
  [15] = { "endpoint", 1 },
  [16] = { "endpoint", 1 },
  [17] = { "status", 1, "endpoint", 1 },
  [18] = { "endpoints", 4, "streams", 4 },
  [19] = { "endpoints", 4 },
  [20] = { "endpoints", 4, "streams", 4, "status", 1 },
  [25] = { "stream_id", 4, "bytes_per_transfer", 4, "endpoint", 1, "transfers", 1 },
  [26] = { "stream_id", 4, "endpoint", 1 },
  [27] = { "stream_id", 4, "endpoint", 1, "status", 1 },
  [100] = { "endpoint", 1, "request", 1, "request_type", 1, "status", 1, "value", 2, "index", 2, "wlength", 2 },
  [102] = { "endpoint", 1, "status", 1, "data_length", 2 },
  [103] = { "endpoint", 1, "status", 1, "data_length", 2 },
  [104] = { "stream_id", 4, "data_length", 4, "endpoint", 1, "status", 1 },
}
-- How the info column shows a field.
local SHOWN = {
  endpoint = "ep %02x", configuration = "%d", interface = "interface %d", alt = "alt %d", streams = "%d streams",
  stream_id = "stream %d", data_length = "%d bytes", request = "%02x", request_type = "%02x", value = "%04x",
  index = "%04x", wlength = "%d bytes", vendor = "%04x", product = "%04x",
}

local function has(word, bit) return math.floor(word / 2 ^ (bit - 1)) % 2 == 1 end

local function little_endian(bytes, at)
  local a, b, c, d = bytes:byte(at, at + 3)
  return a + 256 * (b + 256 * (c + 256 * d))
end

-- One packet -------------------------------------------------------------------------------------------------------

local function show_fields(tvb, branch, at, layout)
  local texts = {}
  local empty = true
  for index = 1, #layout, 2 do
    local name, size = layout[index], layout[index + 1]
    if at + size > tvb:len() then break end
    local range = tvb(at, size)
    local value = range:le_uint()
    branch:add_le(fields[name], range)
    if name == "status" then
      texts[#texts + 1] = STATUSES[value] -- QEMU leaves the status of its requests uninitialised
    elseif name == "speed" then
      texts[#texts + 1] = SPEEDS[value] or tostring(value)
    elseif SHOWN[name] and not (name == "stream_id" and value == 0) then
      texts[#texts + 1] = string.format(SHOWN[name], value)
    end
    if name == "endpoints" and value ~= 0 then empty = false end
    at = at + size
  end
  return at, table.concat(texts, " "), empty
end

local function show_bulk(tvb, branch, at, long)
  if at + 8 > tvb:len() then return at, "" end
  local endpoint, status = tvb(at, 1):uint(), tvb(at + 1, 1):uint()
  local size, stream = tvb(at + 2, 2):le_uint(), tvb(at + 4, 4):le_uint()
  branch:add(fields.endpoint, tvb(at, 1))
  branch:add(fields.status, tvb(at + 1, 1))
  local length_range, header = tvb(at + 2, 2), 8
  if long and at + 10 <= tvb:len() then
    size, header = size + 65536 * tvb(at + 8, 2):le_uint(), 10
  end
  branch:add(fields.data_length, length_range, size)
  branch:add_le(fields.stream_id, tvb(at + 4, 4))
  local text = string.format("ep %02x %d bytes", endpoint, size)
  if stream ~= 0 then text = text .. " stream " .. stream end
  if STATUSES[status] then text = text .. " " .. STATUSES[status] end
  return at + header, text
end

local function show_hello(tvb, branch, at)
  if at + VERSION_SIZE > tvb:len() then return at, "" end
  local version = tvb(at, VERSION_SIZE):stringz()
  branch:add(fields.version, tvb(at, VERSION_SIZE))
  at = at + VERSION_SIZE
  while at + 4 <= tvb:len() do
    local word, names = tvb(at, 4):le_uint(), {}
    for bit, name in ipairs(CAPABILITIES) do
      if has(word, bit) then names[#names + 1] = name end
    end
    branch:add_le(fields.caps, tvb(at, 4)):append_text(" " .. table.concat(names, " "))
    at = at + 4
  end
  return at, "'" .. version .. "'"
end

local function show_interfaces(tvb, branch, at)
  if at + 132 > tvb:len() then return at, "" end
  local count = math.min(tvb(at, 4):le_uint(), 32)
  branch:add_le(fields.interface_count, tvb(at, 4))
  for index = 0, count - 1 do
    local one = branch:add(usbredir, tvb(at + 4 + index, 1), "Interface")
    one:add(fields.interface, tvb(at + 4 + index, 1))
    one:add(fields.class, tvb(at + 36 + index, 1))
    one:add(fields.subclass, tvb(at + 68 + index, 1))
    one:add(fields.protocol, tvb(at + 100 + index, 1))
  end
  return at + 132, count .. " interfaces"
end

local function show_endpoints(tvb, branch, at)
  if at + 96 > tvb:len() then return at, "" end
  local names = {}
  local with_sizes, with_streams = at + 160 <= tvb:len(), at + 288 <= tvb:len()
  for index = 0, 31 do
    local kind = tvb(at + index, 1):uint()
    if kind ~= 255 then
      local address = index < 16 and index or index - 16 + 128
      local text = string.format("%02x: %s, interface %d, interval %d", address, ENDPOINT_TYPES[kind] or kind,
        tvb(at + 64 + index, 1):uint(), tvb(at + 32 + index, 1):uint())
      if with_sizes then text = text .. ", " .. tvb(at + 96 + 2 * index, 2):le_uint() .. " bytes" end
      if with_streams then text = text .. ", " .. tvb(at + 160 + 4 * index, 4):le_uint() .. " streams" end
      branch:add(fields.endpoint, tvb(at + index, 1), address):append_text(" " .. text)
      names[#names + 1] = string.format("%02x", address)
    end
  end
  local size = 96
  if with_streams then size = 288 elseif with_sizes then size = 160 end
  return at + size, "ep " .. table.concat(names, " ")
end

-- Show a packet in the tree. Return its line of the info column, or nil if there is nothing to see.
local function show(bytes, tree, packet)
  local tvb = ByteArray.new(bytes, true):tvb("usbredir packet")
  local kind = tvb(0, 4):le_uint()
  local name = TYPES[kind] or ("type " .. kind)
  local branch = tree:add(usbredir, tvb(), "USB Redirection, " .. name)
  branch:add_le(fields.type, tvb(0, 4))
  branch:add_le(fields.length, tvb(4, 4))
  local at = packet.wide and 16 or 12
  if packet.wide then
    branch:add_le(fields.id, tvb(8, 8))
  else
    branch:add(fields.id, tvb(8, 4), UInt64(tvb(8, 4):le_uint(), 0))
  end
  local text, empty = "", false
  if kind == HELLO then
    at, text = show_hello(tvb, branch, at)
  elseif kind == 4 then
    at, text = show_interfaces(tvb, branch, at)
  elseif kind == 5 then
    at, text = show_endpoints(tvb, branch, at)
  elseif kind == FILTER then
    if at < tvb:len() then
      branch:add(fields.filter, tvb(at))
      text = tvb(at):stringz()
    end
    at = tvb:len()
  elseif kind == BULK then
    at, text = show_bulk(tvb, branch, at, packet.long)
  elseif LAYOUTS[kind] then
    at, text, empty = show_fields(tvb, branch, at, LAYOUTS[kind])
  end
  if at < tvb:len() then
    branch:add(kind >= FIRST_DATA_TYPE and fields.data or fields.rest, tvb(at))
  end
  -- Status packets about nothing, which farplug puts around each message over SPICE. One has the type of a filter
  -- packet in its id.
  local wraps = kind == BULK_STREAMS_STATUS and (empty or packet.wide and bytes:byte(14) == FILTER)
    or kind == BULK_RECEIVING_STATUS and text == "ep 80 success"
  if wraps then
    branch:append_text(" (envelope)")
    return nil
  end
  return text == "" and name or name .. " " .. text
end

-- The stream of one direction of a connection ------------------------------------------------------------------------

local connections = {} -- by TCP stream
local packets = {} -- by frame: the packets that end there

local function reset()
  connections, packets = {}, {}
end
usbredir.init = reset
inside.init = reset

local function shared(connection, bit)
  local count = 0
  for _, caps in pairs(connection.caps) do
    if not has(caps, bit) then return false end
    count = count + 1
  end
  return count == 2
end

-- Take bytes in order. Only the first pass over a file calls this.
local function feed(stream, side, frame, bytes, missing)
  local connection = connections[stream]
  if not connection then
    connection = { caps = {}, rest = {}, skipped = {} }
    connections[stream] = connection
  end
  local buffer = (connection.rest[side] or "") .. bytes
  if missing > 0 then buffer = buffer .. string.rep("\0", missing) end
  while true do
    local skip = math.min(connection.skipped[side] or 0, #buffer)
    if skip > 0 then
      connection.skipped[side] = connection.skipped[side] - skip
      buffer = buffer:sub(skip + 1)
    end
    if #buffer < 12 then break end
    local kind, length = little_endian(buffer, 1), little_endian(buffer, 5)
    local wide = kind ~= HELLO and connection.wide
    local header = wide and 16 or 12
    local wanted = header + math.min(length, KEPT)
    if #buffer < wanted then break end
    local packet = { bytes = buffer:sub(1, wanted), wide = wide, long = connection.long }
    packets[frame] = packets[frame] or {}
    table.insert(packets[frame], packet)
    connection.skipped[side] = header + length - wanted
    buffer = buffer:sub(wanted + 1)
    if kind == HELLO then
      local with_caps = length >= VERSION_SIZE + 4
      connection.caps[side] = with_caps and little_endian(packet.bytes, 12 + VERSION_SIZE + 1) or 0
      connection.wide, connection.long = shared(connection, 6), shared(connection, 7)
    end
  end
  connection.rest[side] = buffer
end

local function show_packets(pinfo, tree)
  local texts = {}
  for _, packet in ipairs(packets[pinfo.number] or {}) do
    texts[#texts + 1] = show(packet.bytes, tree, packet)
  end
  if packets[pinfo.number] then pinfo.cols.protocol:set("usbredir") end
  if #texts > 0 then pinfo.cols.info:set(table.concat(texts, ", ")) end
end

-- Inside SPICE: its dissector passes the data of a channel to no other, so look at what it found.
local spice_data, spice_channel = Field.new("spice.data"), Field.new("spice.channel_type")
local tcp_stream, tcp_source = Field.new("tcp.stream"), Field.new("tcp.srcport")
local USBREDIR_CHANNEL = 9
local channels = {}

function inside.init()
  reset()
  channels = {}
end

function inside.dissector(tvb, pinfo, tree)
  local stream, kind = tcp_stream(), spice_channel()
  if not stream then return end
  if kind and channels[stream.value] == nil then channels[stream.value] = kind.value == USBREDIR_CHANNEL end
  if not channels[stream.value] then return end
  if not pinfo.visited then
    for _, data in ipairs({ spice_data() }) do
      local bytes = data.range:bytes():raw()
      feed(stream.value, tcp_source().value, pinfo.number, bytes, data.len - #bytes)
    end
  end
  show_packets(pinfo, tree)
end
register_postdissector(inside)

-- Over TCP.
function usbredir.dissector(tvb, pinfo, tree)
  if not pinfo.visited then
    feed(tcp_stream().value, pinfo.src_port, pinfo.number, tvb:raw(), tvb:reported_len() - tvb:len())
  end
  pinfo.cols.protocol:set("usbredir")
  pinfo.cols.info:set("usbredir, part of a packet")
  show_packets(pinfo, tree)
  return tvb:len()
end

-- A connection begins with a hello: type 0, id 0, a text of 64 bytes and a few words of capabilities.
usbredir:register_heuristic("tcp", function(tvb, pinfo, tree)
  if tvb:len() < 12 + VERSION_SIZE or tvb(0, 4):le_uint() ~= HELLO or tvb(8, 4):le_uint() ~= 0 then return false end
  local length = tvb(4, 4):le_uint()
  if length < VERSION_SIZE or length > 4 * VERSION_SIZE or length % 4 ~= 0 then return false end
  pinfo.conversation = usbredir
  usbredir.dissector(tvb, pinfo, tree)
  return true
end)
DissectorTable.get("tcp.port"):add_for_decode_as(usbredir)
